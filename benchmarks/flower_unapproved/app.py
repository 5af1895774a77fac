"""Code of a stranger: run at a site, it reads the site's records and sends what it found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy.strategy_utils import sample_nodes

client = ClientApp()
server = ServerApp()


@client.train()
def read(message: Message, context: Context) -> Message:
    """Read all records of the site; their digest proves it."""
    data = Path(str(context.node_config["data"])).read_bytes()
    seen = ConfigRecord(
        {
            "site": int(context.node_config["site"]),
            "records": len(data.splitlines()),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    )
    return Message(RecordDict({"seen": seen}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Send the code to all sites and write down what came back."""
    nodes, _ = sample_nodes(
        grid, int(context.run_config["sites"]), int(context.run_config["sites"])
    )
    asked = [Message(RecordDict(), message_type="train", dst_node_id=node) for node in nodes]
    replies = grid.send_and_receive(asked, timeout=120)
    seen = [dict(reply.content["seen"]) for reply in replies if reply.has_content()]
    Path(str(context.run_config["seen"])).write_text(json.dumps(seen))
