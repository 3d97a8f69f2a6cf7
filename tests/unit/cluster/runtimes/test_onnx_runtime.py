"""Graphs run, and say what they take and give."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cluster.errors import InputError, PackageError
from cluster.runtimes.onnx import OnnxRuntime, RunStop, describe_graph


def save(
    path: Path, nodes: list[onnx.NodeProto], inputs: list[object], outputs: list[object]
) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.fixture
def adder(tmp_path: Path) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    return save(tmp_path / "add.onnx", [helper.make_node("Add", ["x", "x"], ["y"])], [x], [y])


def test_a_graph_describes_itself(adder: Path) -> None:
    inputs, outputs = describe_graph(adder)
    assert [str(s) for s in inputs] == ["x: FP32 [any, 2]"]
    assert [str(s) for s in outputs] == ["y: FP32 [any, 2]"]


def test_a_graph_runs(adder: Path) -> None:
    y = OnnxRuntime(adder, num_threads=1).run({"x": np.array([[1, 2]], np.float32)})["y"]
    assert y.tolist() == [[2, 4]]


def test_text_tensors_are_bytes_on_our_side(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.STRING, [None])
    y = helper.make_tensor_value_info("y", TensorProto.STRING, [None])
    path = save(tmp_path / "id.onnx", [helper.make_node("Identity", ["x"], ["y"])], [x], [y])
    assert describe_graph(path)[0][0].datatype == "BYTES"
    answer = OnnxRuntime(path).run({"x": np.array(["日".encode(), b"b"], dtype=object)})
    assert answer["y"].tolist() == ["日".encode(), b"b"]


@pytest.mark.parametrize(
    "inputs", [{"x": np.zeros((1, 3), np.float32)}, {"x": np.zeros((1, 2), np.int64)}, {}]
)
def test_inputs_that_do_not_fit_are_an_input_error(adder: Path, inputs: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"x: FP32 \[any, 2\]") as caught:
        OnnxRuntime(adder).run(inputs)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_graph_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(PackageError, match=r"bad\.onnx") as caught:
        describe_graph(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(PackageError, match="does not exist"):
        describe_graph(tmp_path / "none.onnx")


def test_outputs_that_are_not_tensors_are_refused_with_the_fix(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    node = helper.make_node("SequenceConstruct", ["x"], ["y"])
    with pytest.raises(PackageError, match="zipmap"):
        describe_graph(save(tmp_path / "seq.onnx", [node], [x], [y]))


@pytest.mark.parametrize("name", ["x\ny\x1b[2J", "x" * 300])
def test_a_tensor_whose_name_cannot_be_shown_is_one_line(tmp_path: Path, name: str) -> None:
    x = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", [name], ["y"])
    with pytest.raises(PackageError, match="control characters") as caught:
        describe_graph(save(tmp_path / "m.onnx", [node], [x], [y]))
    assert str(caught.value).isprintable()


def test_a_run_that_is_stopped_ends_and_the_next_one_works(tmp_path: Path) -> None:
    weights = helper.make_node("ConstantOfShape", ["shape"], ["W"])
    shape = helper.make_node("Constant", [], ["shape"], value_ints=[256, 256])
    steps = [helper.make_node("MatMul", [f"h{i}", "W"], [f"h{i + 1}"]) for i in range(3000)]
    h0 = helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["n", 256])
    last = helper.make_tensor_value_info("h3000", TensorProto.FLOAT, ["n", 256])
    long = save(tmp_path / "long.onnx", [shape, weights, *steps], [h0], [last])
    runtime, stop = OnnxRuntime(long), RunStop()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(runtime.run, {"h0": np.ones((512, 256), np.float32)}, stop)
        while not running.running():
            time.sleep(0.001)
        stop.set()
        with pytest.raises(InputError, match="terminate"):
            running.result(timeout=10)
    answer = runtime.run({"h0": np.ones((1, 256), np.float32)})
    assert answer["h3000"].shape == (1, 256)
