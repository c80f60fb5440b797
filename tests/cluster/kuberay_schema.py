"""All fields of KubeRay 1.7's RayCluster and RayJob: Kubernetes drops unknown ones silently.

Written down from the operator's field reference (https://docs.ray.io/en/latest/cluster/kubernetes/references/api.html, v1.7.0).
What Kubernetes itself defines, pod templates foremost, is checked against Kubernetes' own schemas in the tests.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
"""Free keys and values. YAML reads 0 as a number and true as a boolean: both are refused here."""
KUBERNETES: Schema = {"type": "object"}
"""A type of Kubernetes' own."""
KUBERNETES_LIST: Schema = {"type": "array", "items": KUBERNETES}


def count(minimum: int = 0) -> Schema:
    return {"type": "integer", "minimum": minimum}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def fields(required: tuple[str, ...] = (), /, **known: Schema) -> Schema:
    """An object that has these fields and no others."""
    return {"type": "object", "properties": known, "required": list(required), "additionalProperties": False}


AUTH = fields(mode=one_of("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=FLAG)

AUTOSCALER = fields(
    version=one_of("v1", "v2"),
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    idleTimeoutSeconds=count(),
    image=TEXT,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    command=list_of(TEXT),
    args=list_of(TEXT),
    resources=KUBERNETES,
    securityContext=KUBERNETES,
    env=KUBERNETES_LIST,
    envFrom=KUBERNETES_LIST,
    volumeMounts=KUBERNETES_LIST,
)

HEAD_GROUP = fields(
    ("template", "rayStartParams"),
    template=KUBERNETES,
    rayStartParams=TEXTS,
    labels=TEXTS,
    resources=TEXTS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    headService=KUBERNETES,
    enableIngress=FLAG,
    ingressOptions=fields(host=TEXT, path=TEXT, pathType=TEXT, tls=KUBERNETES_LIST),
)

WORKER_GROUP = fields(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=TEXT,
    replicas=count(),
    minReplicas=count(),
    maxReplicas=count(),
    numOfHosts=count(1),
    idleTimeoutSeconds=count(),
    priority={"type": "integer"},
    labels=TEXTS,
    resources=TEXTS,
    rayStartParams=TEXTS,
    template=KUBERNETES,
    suspend=FLAG,
    scaleStrategy=fields(workersToDelete=list_of(TEXT)),
)

NETWORK_RULES: dict[str, Schema] = {"ingressRules": KUBERNETES_LIST, "egressRules": KUBERNETES_LIST}

RAY_CLUSTER_SPEC = fields(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=AUTH,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs=list_of(WORKER_GROUP),
    headServiceAnnotations=TEXTS,
    suspend=FLAG,
    managedBy=TEXT,
    upgradeStrategy=fields(type=one_of("Recreate", "None")),
    tlsOptions=fields(enabled=FLAG),
    gcsFaultToleranceOptions=KUBERNETES,  # not checked: no file here uses it
    historyServerOptions=fields(
        collectorOptions=fields(image=TEXT, imagePullPolicy=TEXT, resources=KUBERNETES, env=KUBERNETES_LIST)
    ),
    networkPolicy=fields(
        mode=one_of("DenyAll", "DenyAllIngress", "DenyAllEgress"),
        head=fields(**NETWORK_RULES),
        worker=fields(**NETWORK_RULES),
        workerGroups=list_of(fields(("groupName",), groupName=TEXT, **NETWORK_RULES)),
    ),
)

RAY_JOB_SPEC = fields(
    entrypoint=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    metadata=TEXTS,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterPodTemplate=KUBERNETES,
    submitterConfig=fields(backoffLimit=count()),
    rayClusterSpec=RAY_CLUSTER_SPEC,
    clusterSelector=TEXTS,
    backoffLimit=count(),
    activeDeadlineSeconds=count(1),
    preRunningDeadlineSeconds=count(1),
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=count(),
    deletionStrategy=KUBERNETES,  # not checked: no file here uses it
    managedBy=TEXT,
    suspend=FLAG,
)


def custom_resource(kind: str, spec: Schema) -> Schema:
    """A complete KubeRay resource; its metadata are of Kubernetes."""
    known = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": KUBERNETES, "spec": spec}
    return fields(tuple(known), **known)


SCHEMAS = {
    "RayCluster": custom_resource("RayCluster", RAY_CLUSTER_SPEC),
    "RayJob": custom_resource("RayJob", RAY_JOB_SPEC),
}
