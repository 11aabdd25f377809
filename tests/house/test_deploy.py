"""The deployment files agree with the image and with the server."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsv4serve.api.process import ABORT_GRACE_S, CLOSE_GRACE_S
from dsv4serve.config import EngineConfig

LONGEST_END_S = EngineConfig.model_fields["drain_timeout_s"].default + ABORT_GRACE_S + CLOSE_GRACE_S


@pytest.fixture
def image(root):
    return (root / "Dockerfile").read_text()


def manifests(root, name):
    return list(yaml.safe_load_all((root / "docs/deploy" / name).read_text()))


@pytest.fixture
def pod(root):
    return manifests(root, "kubernetes.yaml")[0]["spec"]["template"]["spec"]


def test_the_pod_runs_as_the_user_of_the_image_and_on_its_port(image, pod):
    (container,) = pod["containers"]
    security = pod["securityContext"]
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}" in image
    assert f"EXPOSE {container['ports'][0]['containerPort']}" in image
    assert EngineConfig.model_fields["port"].default == container["ports"][0]["containerPort"]


def test_probes_ask_routes_that_need_no_key(pod):
    (container,) = pod["containers"]
    paths = [container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")]
    assert paths == ["/ready", "/ready", "/health"]


def test_there_is_time_for_the_whole_drain(root, pod):
    compose = yaml.safe_load((root / "docs/deploy/docker-compose.yml").read_text())["services"]["dsv4serve"]
    assert pod["terminationGracePeriodSeconds"] > LONGEST_END_S
    assert int(compose["stop_grace_period"].removesuffix("s")) > LONGEST_END_S


def test_bases_have_no_default_and_one_name(image):
    assert re.findall(r"^ARG BASE(.*)$", image, flags=re.MULTILINE) == [""]
    assert {line.split()[1] for line in image.splitlines() if line.startswith("FROM")} == {"${BASE}"}


def test_several_nodes_are_servers_like_the_single_one(root):
    """One pod a group, since a server cannot have more nodes yet; pods are those of kubernetes.yaml, one a node."""
    (deployment, service, policy), (groups, shared, same_policy) = (
        manifests(root, name) for name in ("kubernetes.yaml", "leaderworkerset.yaml")
    )
    assert (groups["apiVersion"], groups["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
    group = groups["spec"]["leaderWorkerTemplate"]
    assert group["size"] == 1
    assert groups["spec"]["replicas"] > 1
    template = group["workerTemplate"]
    (apart,) = template["spec"].pop("affinity")["podAntiAffinity"].popitem()[1]
    assert apart["labelSelector"]["matchLabels"] == template["metadata"]["labels"]
    assert template == deployment["spec"]["template"]
    assert shared["spec"].pop("sessionAffinity") == "ClientIP"
    assert (shared, same_policy) == (service, policy)


def test_hadolint_finds_nothing(root):
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, root / "Dockerfile"], capture_output=True, text=True)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")
