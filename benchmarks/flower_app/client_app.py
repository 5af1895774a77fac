"""A round at one site."""

from __future__ import annotations

import time

import lora
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the adapter that came for some steps and send it back."""
    began = time.perf_counter()
    config, site = context.run_config, context.node_config
    packed = bool(config["packed"])
    torch.set_num_threads(int(config["threads"]))
    model = lora.build(str(site["model"]), config).train()
    lora.from_arrays(model, message.content["arrays"], packed=packed)
    rows = lora.rows(str(site["data"]), str(site["model"]), int(config["tokens"]))
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=float(config["learning-rate"]))
    steps, size = int(config["steps"]), int(config["rows"])
    first = (int(message.content["config"]["server-round"]) - 1) * steps * size
    losses = []
    built = time.perf_counter()
    for step in range(steps):
        drawn = torch.arange(first + step * size, first + (step + 1) * size) % len(rows)
        batch = rows[drawn]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    trained = time.perf_counter()
    metrics = MetricRecord(
        {
            "num-examples": steps * size,
            "site": int(site["site"]),
            "build_s": built - began,
            "train_s": trained - built,
            "loss_first": losses[0],
            "loss_last": losses[-1],
        }
    )
    arrays = lora.to_arrays(model, packed=packed)
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
