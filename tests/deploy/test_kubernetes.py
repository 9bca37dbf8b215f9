"""deploy/kubernetes/: the rules that Kubernetes has for the fields that are used, and bahe for the rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bahe_core.home import Home
from feature_repo.store import configuration
from serving.http.api import scope_of
from tests.deploy.test_image import IMAGE, the
from tests.support.cli import require_accepted
from tests.support.deployment import DEPLOY, documents, environment, project, require_known

FILES = {name: documents(DEPLOY / "kubernetes" / name) for name in ("bahe.yaml", "shell.yaml")}
OBJECTS = [one for objects in FILES.values() for one in objects]


def the_one(kind: str) -> dict[str, Any]:
    (found,) = (one for one in OBJECTS if one["kind"] == kind)
    return found


def template_of(workload: dict[str, Any]) -> dict[str, Any]:
    """The pod's, with its labels."""
    spec = workload["spec"]
    found: dict[str, Any] = {
        "Pod": lambda: workload,
        "Deployment": lambda: spec["template"],
        "CronJob": lambda: spec["jobTemplate"]["spec"]["template"],
    }[workload["kind"]]()
    return found


WORKLOADS = [
    pytest.param(one, id=one["kind"]) for one in OBJECTS if one["kind"] in ("Pod", "Deployment", "CronJob")
]


def container_of(workload: dict[str, Any]) -> dict[str, Any]:
    (container,) = template_of(workload)["spec"]["containers"]
    found: dict[str, Any] = container
    return found


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_pod_is_the_images_user_without_rights_and_with_bounds(workload: dict[str, Any]) -> None:
    pod, container = template_of(workload)["spec"], container_of(workload)
    assert container["image"].endswith(f"/bahe:{project()['version']}")
    user = pod["securityContext"]
    assert user["runAsNonRoot"]
    assert f"{user['runAsUser']}:{user['runAsGroup']}" == the("USER").rest
    assert user["fsGroup"] == user["runAsGroup"], "who may write to the volume"
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not pod["automountServiceAccountToken"]
    resources = container["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_what_a_pod_mounts_and_is_told_is_there(workload: dict[str, Any]) -> None:
    pod, container = template_of(workload)["spec"], container_of(workload)
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    volumes = {one["name"]: one for one in pod["volumes"]}
    assert set(mounts) == set(volumes)
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == metadata("PersistentVolumeClaim")
    assert volumes["online-store"]["configMap"]["name"] == metadata("ConfigMap")
    assert mounts["data"] == the("WORKDIR").rest
    assert mounts["tmp"] == environment(IMAGE)["HOME"], "the only other folder that is written to"
    variables = {one["name"]: one for one in container["env"]}
    require_known(set(variables))
    assert variables["BAHE_HOME"]["value"] == environment(IMAGE)["BAHE_HOME"]
    (file,) = the_one("ConfigMap")["data"]
    assert variables["BAHE_FEATURE_STORE"]["value"] == f"{mounts['online-store']}/{file}"
    for name, one in variables.items():
        if "PASSWORD" in name:
            assert one["valueFrom"]["secretKeyRef"] == {"name": "bahe", "key": name}
        else:
            assert isinstance(one["value"], str)


def metadata(kind: str) -> str:
    name: str = the_one(kind)["metadata"]["name"]
    return name


def test_the_commands_are_bahes() -> None:
    for kind in ("Deployment", "CronJob"):
        container = container_of(the_one(kind))
        assert "command" not in container, "it would replace the image's entry point"
        assert all(isinstance(argument, str) for argument in container["args"])
        require_accepted(container["args"])
    said = (DEPLOY / "kubernetes" / "shell.yaml").read_text()
    # The umask of the image's entry point, which `kubectl exec` goes by.
    commands = [words.split() for words in re.findall(r"-- sh -c 'umask 027 && bahe ([^']*)'", said)]
    assert len(commands) == said.count("kubectl exec") == 2
    for command in commands:
        require_accepted(command)


def test_probes_ask_open_routes_of_the_port_that_is_served() -> None:
    """Liveness none that looks at a store: a pod is not killed for a store that is away."""
    container = container_of(the_one("Deployment"))
    (port,) = container["ports"]
    options = dict(zip(container["args"][1::2], container["args"][2::2], strict=False))
    assert str(port["containerPort"]) == options["--port"] == the("EXPOSE").rest
    paths = {}
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container[name]["httpGet"]
        assert asked["port"] == port["name"]
        assert scope_of(asked["path"]) is None
        paths[name] = asked["path"]
    assert paths == {
        "startupProbe": "/readyz",
        "livenessProbe": "/healthz",
        "readinessProbe": "/readyz",
    }
    (target,) = the_one("Service")["spec"]["ports"]
    assert target["targetPort"] == port["name"]


def test_what_selects_the_services_pods_finds_them_and_no_other() -> None:
    deployment, night = the_one("Deployment"), the_one("CronJob")
    labels = template_of(deployment)["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        the_one("Service")["spec"]["selector"],
        the_one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector == labels
        for other in (template_of(night), the_one("Pod")):
            assert other["metadata"]["labels"].items() & selector.items() != selector.items()
    assert the_one("PodDisruptionBudget")["spec"]["minAvailable"] < deployment["spec"]["replicas"]


def test_the_night_is_tried_again_where_that_may_help() -> None:
    night = the_one("CronJob")
    assert len(night["metadata"]["name"]) <= 52
    spec = night["spec"]
    assert len(spec["schedule"].split()) == 5
    assert spec["concurrencyPolicy"] == "Forbid"
    job = spec["jobTemplate"]["spec"]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy allows no other"
    for rule in job["podFailurePolicy"]["rules"]:
        assert rule["action"] in ("FailJob", "Ignore", "Count")
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container_of(night)["name"]
            assert rule["onExitCodes"]["values"] == [2]


def test_the_online_store_is_one_that_a_home_takes(tmp_path: Path) -> None:
    ((name, text),) = the_one("ConfigMap")["data"].items()
    (tmp_path / name).write_text(text)
    store = configuration(Home.at(tmp_path / "home"), str(tmp_path / name))["online_store"]
    assert store["type"] == "feast_ducklake.GuardedRedisOnlineStore"
    assert "${REDIS_PASSWORD}" in store["url"]
    assert yaml.safe_load(text) == {"online_store": store}
