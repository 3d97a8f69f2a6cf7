"""What a client sends becomes what the graph takes, or a clear refusal."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cluster.errors import InputError, PackageError, PayloadTooLargeError
from cluster.processing import (
    Array,
    Cast,
    ImageInput,
    Labels,
    Processing,
    Rename,
    Reshape,
    Scale,
    Softmax,
    Standardize,
    TensorSpec,
    check_processing,
    is_batchable,
    postprocess,
    preprocess,
    public_inputs,
    public_outputs,
)


@dataclass(frozen=True)
class Model:
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    processing: Processing


def spec(name: str, shape: tuple[int, ...], datatype: str = "FP32") -> TensorSpec:
    return TensorSpec.model_validate({"name": name, "datatype": datatype, "shape": shape})


DIGITS = Model(
    inputs=(spec("pixels", (-1, 1, 8, 8)),),
    outputs=(spec("logits", (-1, 3)),),
    processing=Processing(
        inputs=(spec("pixels", (-1, 64)),),
        raw_inputs={"image": ImageInput(target="pixels", width=8, height=8, scale=16 / 255)},
        pre=(Scale(tensor="pixels", factor=1 / 16), Reshape(tensor="pixels", shape=(1, 8, 8))),
        post=(
            Labels(tensor="logits", labels=("zero", "one", "two")),
            Softmax(tensor="logits", into="probabilities"),
        ),
    ),
)


def png(values: Array, mode: str = "L", **options: object) -> Array:
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).convert(mode).save(buffer, "PNG", **options)
    return np.array([buffer.getvalue()], dtype=object)


def test_a_png_means_the_same_as_its_pixels() -> None:
    pixels = np.arange(64).reshape(8, 8) % 17
    image = png(np.round(pixels * 255 / 16))
    from_image = preprocess(DIGITS, {"image": image})["pixels"]
    from_pixels = preprocess(DIGITS, {"pixels": pixels.reshape(1, 64).astype(np.float32)})["pixels"]
    assert from_image.shape == (1, 1, 8, 8)
    np.testing.assert_allclose(from_image, from_pixels, atol=0.5 / 255)


def test_transparent_palette_and_sixteen_bit_pngs_are_read_as_seen() -> None:
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    white = preprocess(DIGITS, {"image": png(clear, "RGBA")})["pixels"]
    np.testing.assert_allclose(white, 1.0)
    palette = preprocess(DIGITS, {"image": png(np.full((8, 8), 255), "P")})["pixels"]
    np.testing.assert_allclose(palette, 1.0)
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16)).save(buffer, "PNG")
    deep = preprocess(DIGITS, {"image": np.array([buffer.getvalue()], dtype=object)})["pixels"]
    np.testing.assert_allclose(deep, 1.0)


def test_colour_images_come_channel_first_and_resized() -> None:
    model = Model(
        inputs=(spec("x", (-1, 3, 2, 2)),),
        outputs=(),
        processing=Processing(
            raw_inputs={"file": ImageInput(target="x", mode="RGB", width=2, height=2)}
        ),
    )
    check_processing(model)
    red = np.zeros((4, 4, 3))
    red[..., 0] = 255
    x = preprocess(model, {"file": png(red, "RGB")})["x"]
    np.testing.assert_array_equal(x[0, :, 0, 0], [255, 0, 0])


def test_an_image_bomb_is_refused_on_its_header() -> None:
    buffer = io.BytesIO()
    Image.new("1", (6000, 6000)).save(buffer, "PNG")
    with pytest.raises(PayloadTooLargeError, match="6000x6000"):
        preprocess(DIGITS, {"image": np.array([buffer.getvalue()], dtype=object)})


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_image_reader(data: bytes) -> None:
    with pytest.raises(InputError) as caught:
        preprocess(DIGITS, {"image": np.array([b"\x89PNG\r\n\x1a\n" + data], dtype=object)})
    assert caught.value.param == "image"


@pytest.mark.parametrize(
    ("inputs", "param", "message"),
    [
        ({}, "pixels", "missing"),
        ({"pixel": np.zeros((1, 64), np.float32)}, "pixel", "unknown input"),
        ({"pixels": np.zeros((1, 63), np.float32)}, "pixels", r"shape \[1, 63\]"),
        ({"pixels": np.zeros((0, 64), np.float32)}, "pixels", r"shape \[0, 64\]"),
        ({"pixels": np.zeros((1, 64), np.float64)}, "pixels", "FP64"),
        ({"pixels": np.full((1, 64), np.nan, np.float32)}, "pixels", "NaN"),
        ({"image": np.array(["text"], dtype=object)}, "image", "str"),
        ({"image": np.array([b"GIF89a"], dtype=object)}, "image", "not a readable PNG"),
    ],
)
def test_a_wrong_input_is_named(inputs: dict[str, Array], param: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        preprocess(DIGITS, inputs)
    assert caught.value.param == param


def test_an_input_sent_twice_is_refused() -> None:
    both = {"pixels": np.zeros((1, 64), np.float32), "image": png(np.zeros((8, 8)))}
    with pytest.raises(InputError, match="both stand for 'pixels'"):
        preprocess(DIGITS, both)


def test_inputs_must_agree_on_the_number_of_samples() -> None:
    model = Model((spec("a", (-1, 2)), spec("b", (-1,))), (), Processing())
    with pytest.raises(InputError, match="'a' 3, 'b' 2"):
        preprocess(model, {"a": np.zeros((3, 2), np.float32), "b": np.zeros(2, np.float32)})


def test_post_processing_adds_labels_and_probabilities() -> None:
    answer = postprocess(DIGITS, {"logits": np.array([[0, 5, 1], [9, 0, 0]], np.float32)})
    assert answer["label"].tolist() == [b"one", b"zero"]
    np.testing.assert_allclose(answer["probabilities"].sum(axis=-1), 1, rtol=1e-6)
    for described in public_outputs(DIGITS):
        assert answer[described.name].dtype == described.numpy_dtype
        assert answer[described.name].ndim == len(described.shape)


def test_public_faces_list_tensors_and_raw_inputs() -> None:
    assert [str(s) for s in public_inputs(DIGITS)] == [
        "pixels: FP32 [any, 64]",
        "image: BYTES [any]",
    ]
    assert [s.name for s in public_outputs(DIGITS)] == ["logits", "label", "probabilities"]
    check_processing(DIGITS)


def test_only_free_first_dimensions_are_batchable() -> None:
    assert is_batchable(DIGITS)
    fixed = Model((spec("x", (4, 2)),), (spec("y", (-1,)),), Processing())
    assert not is_batchable(fixed)
    scalar = Model((spec("x", ()),), (spec("y", (-1,)),), Processing())
    assert not is_batchable(scalar)


def test_standardize_cast_and_rename() -> None:
    model = Model(
        inputs=(spec("features", (-1, 2), "FP16"),),
        outputs=(),
        processing=Processing(
            inputs=(spec("x", (-1, 2)),),
            pre=(
                Standardize(tensor="x", mean=(1.0, 2.0), std=(2.0, 4.0)),
                Cast(tensor="x", datatype="FP16"),
                Rename(tensor="x", into="features"),
            ),
        ),
    )
    check_processing(model)
    x = preprocess(model, {"x": np.array([[3, 10]], np.float32)})["features"]
    assert x.dtype == np.float16
    assert x.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    "processing",
    [
        Processing(pre=(Scale(tensor="nothing"),)),
        Processing(pre=(Reshape(tensor="pixels", shape=(65,)),)),
        Processing(inputs=(spec("pixels", (-1, 64)),)),
        Processing(post=(Labels(tensor="logits", labels=("one",)),)),
        Processing(post=(Labels(tensor="logits", into="logits", labels=("a",) * 3),) * 2),
        Processing(raw_inputs={"image": ImageInput(target="pixels", width=9, height=8)}),
        Processing(raw_inputs={"image": ImageInput(target="other", width=8, height=8)}),
    ],
)  # fmt: skip
def test_processing_that_does_not_fit_the_graph_is_refused(processing: Processing) -> None:
    with pytest.raises(PackageError):
        check_processing(Model(DIGITS.inputs, DIGITS.outputs, processing))


def test_processing_survives_json() -> None:
    text = DIGITS.processing.model_dump_json()
    assert Processing.model_validate_json(text) == DIGITS.processing
