"""A clusterer in one file: mini-batch k-means, for banks of which each pass over all rows would take too long."""

from cmcgns.clustering.kmeans import farthest_point_seeds, kmeans

ROWS = 512


def cluster(rows, start_KD, num_clusters, config):
    if start_KD is None:  # the first clustering of the run
        start_KD = farthest_point_seeds(rows, num_clusters)
    return kmeans(rows, start_KD, config.iterations, config.tolerance, batch_rows=ROWS)
