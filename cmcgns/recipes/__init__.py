"""The configs that we ship; `--config NAME` takes one without a path, and jobs/configs/ links to them."""
