"""A graph that takes time, and clients that ask for it, slow ones among them."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.stack import Stack

INFER = "/v2/models/work/infer"
NUM_SLOW = 200
_WIDTH = 512


def save_work(path: Path, num_layers: int = 400) -> None:
    """Gives `y`, the mean of what goes in, after some work, and `wide`, the same many times."""
    mean = numpy_helper.from_array(np.full((_WIDTH, _WIDTH), 1 / _WIDTH, np.float32), "W")
    nodes = [helper.make_node("Tile", ["x", "repeats"], ["h0"])]
    nodes += [helper.make_node("MatMul", [f"h{i}", "W"], [f"h{i + 1}"]) for i in range(num_layers)]
    nodes.append(helper.make_node("ReduceMean", [f"h{num_layers}"], ["y"], axes=[1], keepdims=1))
    nodes.append(helper.make_node("Identity", [f"h{num_layers}"], ["wide"]))
    graph = helper.make_graph(
        nodes,
        "work",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1]),
            helper.make_tensor_value_info("wide", TensorProto.FLOAT, ["batch", _WIDTH]),
        ],
        [mean, numpy_helper.from_array(np.array([1, _WIDTH], np.int64), "repeats")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )


def body_of(num_rows: int, output: str = "y") -> str:
    tensor = {"name": "x", "datatype": "FP32", "shape": [num_rows, 1], "data": [1.0] * num_rows}
    return json.dumps({"inputs": [tensor], "outputs": [{"name": output}]})


def connect(stack: Stack) -> socket.socket:
    return socket.create_connection(("127.0.0.1", stack.settings.gateway_port), timeout=20)


def head_of(stack: Stack, path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {stack.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


@contextlib.contextmanager
def slow_clients(stack: Stack) -> Iterator[Callable[[], None]]:
    """NUM_SLOW connections that take their time; what is given lets them go on a little."""
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(connect(stack)) for _ in range(NUM_SLOW)]
        writers, readers, beginners = clients[:100], clients[100:120], clients[120:]
        for client in writers:
            # Head and some of the body, and then a byte now and then.
            client.sendall(head_of(stack, INFER, 10**6) + b" " * 20_000)
        asked = body_of(30, "wide").encode()
        for client in readers:
            # Hundreds of kilobytes that nobody reads.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(head_of(stack, INFER, len(asked)) + asked)
        for client in beginners:
            client.sendall(f"POST {INFER} HTTP/1.1\r\nhost: ".encode())

        def go_on() -> None:
            for client in writers:
                with contextlib.suppress(OSError):  # it was given up meanwhile
                    client.sendall(b" ")

        yield go_on
