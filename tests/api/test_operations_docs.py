"""docs/operations.md and the Grafana dashboard name the metrics that a server exports, all of them and no others."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

DOCS = Path(__file__).resolve().parents[2] / "docs"
ROW = re.compile(r"^\| `(dsv4serve:\w+)` \| (\w+) \| ([^|]*?) \| (.+) \|$", re.MULTILINE)


@pytest.fixture
def families(server) -> list:
    """What a server exports; every label has been used, so every series is there."""
    server.say("thinking on and on<｜DSML｜")
    server.chat()
    metrics = server.app.state.frontend.metrics
    metrics.malformed.labels("no_call").inc()
    return list(text_string_to_metric_families(server.client.get("/metrics").text))


def test_the_table_of_metrics_is_complete_and_true(families):
    exported = set()
    for family in families:
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        name = family.name + ("_total" if family.type == "counter" else "")
        exported.add((name, family.type, ", ".join(sorted(labels)), family.documentation))
    assert set(ROW.findall((DOCS / "operations.md").read_text(encoding="utf-8"))) == exported


def test_the_dashboard_shows_every_metric_and_nothing_else(families):
    dashboard = json.loads((DOCS / "ops/grafana-dashboard.json").read_text(encoding="utf-8"))
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = set(re.findall(r"dsv4serve:\w+", " ".join(targets)))
    assert shown <= {sample.name for family in families for sample in family.samples}
    assert not [family.name for family in families if not any(name.startswith(family.name) for name in shown)]


def test_queries_use_labels_that_exist(families):
    labels = {name for family in families for sample in family.samples for name in sample.labels} | {"job"}
    text = (DOCS / "ops/grafana-dashboard.json").read_text(encoding="utf-8")
    used = set(re.findall(r"by \((\w+)\)", text)) | set(re.findall(r"[{,](\w+)=", text))
    assert used <= labels
