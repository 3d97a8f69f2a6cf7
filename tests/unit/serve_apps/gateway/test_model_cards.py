"""GET /v1/catalogue: what is served, with its traffic and its cards."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import NotFoundError
from cluster.model_package.manifest import Golden, Manifest
from cluster.model_ref import ModelRef
from cluster.processing import ImageInput, Labels, Processing, Softmax
from serve_apps.gateway.model_cards import picture_classes
from serve_apps.gateway.routing_table import RoutingTable, ServedVersion


async def catalogue(gateway: Any, *scopes: str) -> dict[str, list[dict[str, Any]]]:
    answer = await gateway.client.get("/v1/catalogue", headers=gateway.headers(*scopes))
    assert answer.status_code == 200, answer.text
    return {model["id"]: model["versions"] for model in answer.json()["data"]}


@pytest.mark.parametrize("scope", ["models:read", "infer"])
async def test_versions_have_their_share_state_aliases_and_card(gateway: Any, scope: str) -> None:
    models = await catalogue(gateway, scope)
    assert set(models) == {"broken", "classes", "echo", "mute", "talker"}
    new, old = models["classes"]
    assert (new["version"], new["share"], new["aliases"]) == (2, 1.0, ["champion"])
    assert (old["version"], old["share"], old["aliases"]) == (1, 0.0, ["previous"])
    assert new["state"] == "champion"
    assert new["card"].startswith("# classes\n")
    assert "| takes | `image: BYTES [any]` |" in new["card"]
    assert [tensor["name"] for tensor in new["inputs"]] == ["pixels", "image"]
    assert new["picture"] == {
        "input": "image", "width": 2, "height": 2, "is_dark_on_light": False,
        "probabilities": "probabilities", "labels": ["dark", "mixed", "bright"],
    }  # fmt: skip


async def test_language_models_say_what_they_take(gateway: Any) -> None:
    models = await catalogue(gateway)
    assert models["talker"][0]["max_model_len"] == 256
    assert models["talker"][0]["has_chat_template"] is True
    assert models["mute"][0]["has_chat_template"] is False


async def test_a_package_that_cannot_be_opened_is_named_and_hides_no_other(gateway: Any) -> None:
    (broken,) = (await catalogue(gateway))["broken"]
    assert "not what was signed" in broken["error"]
    assert broken["share"] == 1.0


async def test_what_the_table_no_longer_finds_is_left_out(
    gateway: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(_: Any, ref: ModelRef, *_customer: str) -> ServedVersion:
        if ref.name != "talker":
            raise NotFoundError("gone a moment ago")
        return gateway.served["talker", 1]

    monkeypatch.setattr(RoutingTable, "resolve", resolve)
    assert set(await catalogue(gateway)) == {"talker"}


async def test_an_administrators_key_alone_does_not_read_it(gateway: Any) -> None:
    answer = await gateway.client.get("/v1/catalogue", headers=gateway.headers("admin"))
    assert answer.status_code == 403


IMAGE = ImageInput(target="pixels", width=2, height=3, invert=True)
LABELS = Labels(tensor="logits", labels=("a", "b"))


@pytest.mark.parametrize(
    ("raw_inputs", "post", "expected"),
    [
        ({}, (Softmax(tensor="logits"),), None),
        ({"image": IMAGE}, (LABELS,), None),
        ({"image": IMAGE}, (Softmax(tensor="logits"),), ("logits", ())),
        ({"image": IMAGE}, (LABELS, Softmax(tensor="logits", into="p")), ("p", ("a", "b"))),
    ],
)
def test_only_pictures_with_probabilities_can_be_drawn(
    raw_inputs: dict[str, ImageInput], post: tuple[Any, ...], expected: Any
) -> None:
    manifest = Manifest(
        kind="graph",
        name="classes",
        created_at="2026-01-01T00:00:00+00:00",
        files={},
        processing=Processing(raw_inputs=raw_inputs, post=post),
        golden=Golden(inputs={}, outputs={}),
    )
    found = picture_classes(manifest)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert (found.probabilities, found.labels) == expected
    assert (found.input, found.width, found.height) == ("image", 2, 3)
    assert found.is_dark_on_light
