"""The Helm chart, rendered by helm, and what comes out held against Kubernetes' schemas."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "loraplex"
HELM = Path(sys.executable).with_name("helm")
KUBERNETES = "1.31"
OTHERS = ("inference.networking.k8s.io", "gateway.networking.k8s.io", "monitoring.coreos.com")

POOL = ("inferencePool.enabled=true", "inferencePool.gateway.name=g")
POOL += ("inferencePool.endpointPicker.name=e", "settings.METRICS_WITHOUT_KEY=true")
VARIANTS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "gpu": ("gpu.count=2", "gpu.runtimeClassName=nvidia"),
    "several": ("autoscaling.enabled=true",),
    "scraped": ("serviceMonitor.enabled=true", "serviceMonitor.keySecret=s"),
    "routed": POOL,
    "own secrets": ("adminKey.existingSecret=mine", "credentialsSecret=more"),
    "for nobody": ("networkPolicy.clients=null", "networkPolicy.monitoringNamespace="),
}


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HELM, *arguments], capture_output=True, text=True, timeout=60)


def rendered(*values: str) -> list[dict[str, Any]]:
    flags = [part for value in values for part in ("--set", value)]
    done = helm("template", "loraplex", str(CHART), *flags)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [each for each in objects if each["kind"] == kind]
    return found


def test_helm_has_nothing_to_say_against_it() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_what_comes_out_is_kubernetes(values: tuple[str, ...]) -> None:
    objects = rendered(*values)
    for each in objects:
        if each["apiVersion"].partition("/")[0] not in OTHERS:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
    assert {"StatefulSet", "Service", "PodDisruptionBudget"} <= {each["kind"] for each in objects}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (("settings.PORT=1",), "settings.PORT"),
        (("inferencePool.enabled=true",), "METRICS_WITHOUT_KEY"),
        (("serviceMonitor.enabled=true",), "keySecret"),
        (("replicas=many",), "replicas"),
    ],
)
def test_what_cannot_be_is_refused(values: tuple[str, ...], reason: str) -> None:
    flags = [part for value in values for part in ("--set", value)]
    done = helm("template", "loraplex", str(CHART), *flags)
    assert done.returncode != 0
    assert reason in done.stderr


def test_a_pod_is_locked_down() -> None:
    pod = one(rendered(), "StatefulSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    # Or a Service's own variables would be read as settings.
    assert pod["enableServiceLinks"] is False
    key = next(each for each in container["env"] if each["name"] == "LORAPLEX_ADMIN_KEY")
    assert "valueFrom" in key


def test_a_pod_has_longer_than_the_grace() -> None:
    spec = one(rendered("settings.SHUTDOWN_GRACE=100"), "StatefulSet")["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] > 100


def test_settings_are_settings() -> None:
    """Numbers stay as they were written, and the server takes all of them."""
    from server.config import PREFIX, Settings

    objects = rendered("settings.MAX_WAITING=2000000")
    pod = one(objects, "StatefulSet")["spec"]["template"]["spec"]
    names = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    assert names["LORAPLEX_MAX_WAITING"] == "2000000"
    ours = {PREFIX + name.upper() for name in Settings.model_fields}
    assert {name for name in names if name.startswith(PREFIX)} <= ours
