"""Federated averaging that writes down when its rounds began and ended."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import lora
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Report:
    """A file of JSON lines, one for each thing that happens."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def write(self, event: str, **fields: object) -> None:
        """Add a line that says when."""
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "time_s": time.time(), **fields}) + "\n")


class TimedFedAvg(FedAvg):
    """FedAvg, and a report of each round."""

    def __init__(self, report: Report, sites: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
        self.report = report

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Begin a round."""
        self.report.write("round began", round=server_round)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """End a round."""
        arrived = list(replies)
        aggregated = super().aggregate_train(server_round, arrived)
        sites = [dict(reply.content["metrics"]) for reply in arrived if reply.has_content()]
        errors = [reply.error.reason for reply in arrived if reply.has_error()]
        self.report.write("round ended", round=server_round, sites=sites, errors=errors)
        return aggregated


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Start from a new adapter and run all rounds."""
    config = context.run_config
    report = Report(str(config["report"]))
    report.write("started")
    model = lora.build(str(config["model"]), config)
    initial = lora.to_arrays(model, packed=bool(config["packed"]))
    parameters = sum(array.size for array in initial.to_numpy_ndarrays())
    report.write("built", arrays=len(initial), parameters=parameters)
    result = TimedFedAvg(report, int(config["sites"])).start(
        grid=grid,
        initial_arrays=initial,
        num_rounds=int(config["rounds"]),
        timeout=float(config["timeout-s"]),
    )
    if config["adapter"]:
        lora.from_arrays(model, result.arrays, packed=bool(config["packed"]))
        model.save_pretrained(str(config["adapter"]))
    report.write("done")
