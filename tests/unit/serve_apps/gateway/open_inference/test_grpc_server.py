"""The gRPC port: who may call, how large a message may be, what ends, and who else may listen."""

from __future__ import annotations

import asyncio
import socket
import zlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from cluster.errors import PortInUseError
from serve_apps.gateway.open_inference import grpc_calls
from serve_apps.gateway.open_inference.grpc_calls import PUBLIC_METHODS
from serve_apps.gateway.open_inference.grpc_server import GrpcAddress, GrpcServer

BRIGHT = np.array([[1.0, 0.9, 1.0, 1.0]], dtype=np.float32)
SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
INFER = "/inference.GRPCInferenceService/ModelInfer"
OFFERED = {
    "ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfer",
    "ModelStreamInfer",
}  # fmt: skip


@pytest.fixture
async def channel(grpc_address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(grpc_address) as channel:
        yield channel


async def status(call: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    code, details = await call.code(), await call.details()
    return code, details, dict(await call.trailing_metadata())


def pixels(num_rows: int = 1) -> Any:
    array = np.repeat(BRIGHT, num_rows, axis=0)
    return triton.InferInput("pixels", list(array.shape), "FP32").set_data_from_numpy(array)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer hst_wrong", "Basic aGVsbG8="])
async def test_every_method_needs_a_key_or_is_on_the_public_list(
    channel: Any, header: str | None
) -> None:
    metadata = () if header is None else (("authorization", header),)
    methods = [f"/{SERVICE.full_name}/{method.name}" for method in SERVICE.methods]
    assert len(methods) > 15
    others = ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/a/B",
              "/ray.serve.ASGIService/HandleRequest"]  # fmt: skip
    for method in [*methods, *others]:
        call = channel.unary_unary(method)(b"", metadata=metadata)
        code, details, trailing = await status(call)
        if method in PUBLIC_METHODS:
            assert code is grpc.StatusCode.OK, method
        else:
            assert code is grpc.StatusCode.UNAUTHENTICATED, method
            assert "key" in details
        assert trailing["x-request-id"].startswith("req_")


async def test_no_message_is_read_before_the_key(channel: Any) -> None:
    async def endless() -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield b""

    call = channel.stream_unary(INFER)(endless())
    assert (await status(call))[0] is grpc.StatusCode.UNAUTHENTICATED


async def test_a_message_that_does_not_come_ends_its_call(
    gateway: Any, channel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_calls, "_MAX_MESSAGE_S", 0.1)
    monkeypatch.setattr(grpc_calls, "_MAX_PUBLIC_S", 0.1)

    async def endless() -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield b""

    async def nothing() -> AsyncIterator[bytes]:
        for message in ():
            yield message

    metadata = tuple(gateway.headers("infer").items())
    live = "/inference.GRPCInferenceService/ServerLive"
    # Without a key too: so many calls at once are all that there are.
    for method, own in ((live, ()), (INFER, metadata)):
        code, details, _ = await status(channel.stream_unary(method)(endless(), metadata=own))
        assert (code.name, details) == (
            "DEADLINE_EXCEEDED", "no message arrived within 0.1 s; send it faster",
        )  # fmt: skip
        code, details, _ = await status(channel.stream_unary(method)(nothing(), metadata=own))
        assert code.name == "INVALID_ARGUMENT"


async def test_a_stream_that_falls_silent_ends(
    gateway: Any, grpc_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_calls, "_MAX_SILENCE_S", 0.1)

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "classes", "inputs": [pixels()]}
        await asyncio.sleep(60)

    async with triton.InferenceServerClient(grpc_address) as client:
        answers = client.stream_infer(requests(), headers=gateway.headers("infer"))
        result, _ = await anext(answers)
        assert result is not None
        with pytest.raises(grpc.aio.AioRpcError, match="no message arrived"):
            await anext(answers)
    labels = {"protocol": "open_inference_grpc", "route": "ModelStreamInfer"}
    count = gateway.telemetry.instruments.registry.get_sample_value
    seen = [count("heliostat_requests_total", {**labels, "status": s}) for s in ("200", "408")]
    assert seen == [1, 1]


async def test_what_is_not_offered_is_unimplemented(gateway: Any, channel: Any) -> None:
    metadata = tuple(gateway.headers().items())
    for method in SERVICE.methods:
        if method.name not in OFFERED:
            call = channel.unary_unary(f"/{SERVICE.full_name}/{method.name}")(
                b"", metadata=metadata
            )
            code, details, _ = await status(call)
            assert code is grpc.StatusCode.UNIMPLEMENTED
            assert method.name in details


@pytest.mark.parametrize(
    ("method", "scopes", "code"),
    [
        ("ServerMetadata", ["models:read"], "OK"),
        ("ServerMetadata", ["admin"], "PERMISSION_DENIED"),
        ("ModelMetadata", ["admin"], "PERMISSION_DENIED"),
        ("ModelReady", ["admin"], "PERMISSION_DENIED"),
        ("ModelInfer", ["models:read", "admin"], "PERMISSION_DENIED"),
        ("ModelInfer", ["infer"], "NOT_FOUND"),
    ],
)
async def test_scopes_decide(
    gateway: Any, channel: Any, method: str, scopes: list[str], code: str
) -> None:
    metadata = tuple(gateway.headers(*scopes).items())
    call = channel.unary_unary(f"/{SERVICE.full_name}/{method}")(b"", metadata=metadata)
    assert (await status(call))[0].name == code


async def test_a_stream_ends_when_its_key_is_revoked(gateway: Any, grpc_address: str) -> None:
    created = gateway.keys.create("acme", ["infer"])
    revoked = asyncio.Event()

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "classes", "inputs": [pixels()]}
        await revoked.wait()
        yield {"model_name": "classes", "inputs": [pixels()]}

    async with triton.InferenceServerClient(grpc_address) as client:
        headers = {"authorization": f"Bearer {created.key}"}
        answers = client.stream_infer(requests(), headers=headers)
        result, error = await anext(answers)
        assert result is not None
        assert error is None
        gateway.keys.revoke(created.id)
        await asyncio.sleep(0.9)  # a key is remembered for less than a second
        revoked.set()
        with pytest.raises(grpc.aio.AioRpcError, match="is revoked") as caught:
            await anext(answers)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_the_answer_names_the_request_and_the_model(gateway: Any, channel: Any) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    request = service_pb2.ModelInferRequest(
        model_name="classes",
        inputs=[{"name": "pixels", "datatype": "FP32", "shape": [1, 4]}],
        raw_input_contents=[BRIGHT.tobytes()],
    )
    metadata = (*gateway.headers().items(), ("x-request-id", "mine-1"))
    for sent in (request, service_pb2.ModelInferRequest(model_name="classes")):
        _, _, trailing = await status(stub.ModelInfer(sent, metadata=metadata))
        assert trailing == {"x-request-id": "mine-1", "x-model-version": "classes/2"}


async def test_health_is_grpcs_own(channel: Any) -> None:
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    assert await check(b"") == b"\x08\x01"
    assert await check(b"\n\x1einference.GRPCInferenceService") == b"\x08\x01"
    assert (await status(check(b"\n\x04none")))[0] is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
async def test_a_message_is_as_large_as_a_body_may_be(
    gateway: Any, grpc_address: str, compression: str | None
) -> None:
    """Compressed to little it is still too large."""
    async with triton.InferenceServerClient(grpc_address) as client:
        options = {"headers": gateway.headers(), "compression_algorithm": compression}
        result = await client.infer("classes", [pixels(4000)], **options)
        assert result.as_numpy("logits").shape == (4000, 3)
        assert len(zlib.compress(np.repeat(BRIGHT, 5000, axis=0).tobytes())) < 1000
        with pytest.raises(InferenceServerException, match="larger than max") as caught:
            await client.infer("classes", [pixels(5000)], **options)
        assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


async def test_what_is_no_message_is_an_error_of_the_client(gateway: Any, channel: Any) -> None:
    call = channel.unary_unary(INFER)(b"\xff" * 9, metadata=tuple(gateway.headers().items()))
    code, details, _ = await status(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "no ModelInferRequest" in details


@pytest.mark.parametrize("leaves", [True, False])
async def test_a_deadline_or_a_cancellation_frees_the_place(
    gateway: Any, grpc_address: str, leaves: bool
) -> None:
    """classes takes one call at a time and eight in its queue."""
    held = asyncio.Event()
    began = asyncio.Event()
    predict = gateway.backend.predict

    async def slowly(application: str, arrays: Any) -> Any:
        began.set()
        await held.wait()
        return await predict(application, arrays)

    gateway.backend.predict = slowly
    async with triton.InferenceServerClient(grpc_address) as client:
        options: dict[str, Any] = {"headers": gateway.headers()}

        def infer(**more: Any) -> asyncio.Task[Any]:
            return asyncio.create_task(client.infer("classes", [pixels()], **options, **more))

        first = infer()
        await began.wait()
        gone = [infer(client_timeout=None if leaves else 0.3) for _ in range(8)]
        if leaves:
            await asyncio.sleep(0.3)
            for task in gone:
                task.cancel()
        results = await asyncio.gather(*gone, return_exceptions=True)
        assert not [result for result in results if isinstance(result, triton.InferResult)]
        await asyncio.sleep(0.2)  # the server hears of it
        waiting = [infer() for _ in range(8)]
        await asyncio.sleep(0.1)
        held.set()
        assert len(await asyncio.gather(first, *waiting)) == 9


async def test_it_listens_where_it_is_told(gateway: Any) -> None:
    port = gateway.app.state.grpc_server.port
    # Other tests of the same process may have left sockets of their own.
    (address,) = [
        connection.laddr
        for connection in psutil.Process().net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    ]
    assert address.ip in ("127.0.0.1", "::ffff:127.0.0.1")


def another_server(gateway: Any, port: int) -> GrpcServer:
    return GrpcServer(
        gateway.app.state.grpc_server._service,
        gateway.app.state.grpc_server._door,
        GrpcAddress("127.0.0.1", port),
        max_message_bytes=1024,
    )


async def test_replicas_share_the_port_and_a_stranger_is_named(gateway: Any) -> None:
    port = gateway.app.state.grpc_server.port
    second = another_server(gateway, port)
    await second.start()
    assert second.port == port
    await second.stop()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PortInUseError, match="HELIOSTAT_GRPC_PORT"):
            await another_server(gateway, taken.getsockname()[1]).start()


async def test_a_stopping_server_lets_calls_under_way_end(gateway: Any) -> None:
    server = gateway.app.state.grpc_server
    predict = gateway.backend.predict
    began = asyncio.Event()

    async def slowly(application: str, arrays: Any) -> Any:
        began.set()
        await asyncio.sleep(0.3)
        return await predict(application, arrays)

    gateway.backend.predict = slowly
    async with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        answer = asyncio.create_task(client.infer("classes", [pixels()], headers=gateway.headers()))
        await began.wait()
        await server.stop()
        assert (await answer).as_numpy("label").tolist() == [b"bright"]
        with pytest.raises(InferenceServerException):
            await client.infer("classes", [pixels()], headers=gateway.headers())


def infer_request(model: str = "classes") -> Any:
    return service_pb2.ModelInferRequest(
        model_name=model,
        inputs=[{"name": "pixels", "datatype": "FP32", "shape": [1, 4]}],
        raw_input_contents=[BRIGHT.tobytes()],
    )


async def test_a_tenants_limits_hold_here_too(gateway: Any, channel: Any) -> None:
    gateway.keys.set_tenant("acme", {"requests_per_minute": 3})
    metadata = tuple(gateway.headers("infer").items())
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    code, _, trailing = await status(stub.ModelInfer(infer_request(), metadata=metadata))
    assert code is grpc.StatusCode.OK
    assert trailing["x-ratelimit-remaining-requests"] == "2"
    stream = stub.ModelStreamInfer(iter([infer_request()] * 3), metadata=metadata)
    errors = [answer.error_message async for answer in stream]
    assert errors[:2] == ["", ""]
    assert "3 requests per minute" in errors[2]
    code, details, trailing = await status(stub.ModelInfer(infer_request(), metadata=metadata))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "3 requests per minute" in details
    assert 1 <= int(trailing["retry-after"]) <= 63
    looked = stub.ServerMetadata(service_pb2.ServerMetadataRequest(), metadata=metadata)
    assert (await status(looked))[0] is grpc.StatusCode.OK


async def test_a_key_for_one_model_knows_of_no_other(gateway: Any, channel: Any) -> None:
    key = gateway.keys.create("acme", ["infer"], models=["classes"]).key
    metadata = (("authorization", f"Bearer {key}"),)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    seen = [
        await status(stub.ModelInfer(infer_request(model), metadata=metadata))
        for model in ("classes", "talker", "nothing")
    ]
    assert [code.name for code, _, _ in seen] == ["OK", "NOT_FOUND", "NOT_FOUND"]
    assert seen[1][1].replace("talker", "nothing") == seen[2][1]
    ready = service_pb2.ModelReadyRequest(name="talker")
    assert not (await stub.ModelReady(ready, metadata=metadata)).ready


async def test_what_was_answered_is_on_the_bill(gateway: Any, channel: Any) -> None:
    headers = gateway.headers("infer")
    metadata = tuple(headers.items())
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    for model in ("classes", "none", "classes"):
        await status(stub.ModelInfer(infer_request(model), metadata=metadata))
    stream = stub.ModelStreamInfer(iter([infer_request()] * 3), metadata=metadata)
    assert len([answer async for answer in stream]) == 3
    rows: list[Any] = []
    for _ in range(100):
        rows = (await gateway.client.get("/v1/usage", headers=headers)).json()["data"]
        if sum(row["requests"] for row in rows) >= 5:
            break
        await asyncio.sleep(0.05)
    assert sum(row["requests"] for row in rows) == 5


async def test_calls_are_counted_like_requests(gateway: Any, channel: Any) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    metadata = tuple(gateway.headers().items())
    await stub.ModelInfer(infer_request(), metadata=metadata)
    assert [answer async for answer in stub.ModelStreamInfer(one_request(), metadata=metadata)]
    for call in (
        stub.ModelInfer(infer_request("absent"), metadata=metadata),
        stub.ModelInfer(infer_request()),
        channel.unary_unary("/inference.GRPCInferenceService/Invented")(b"", metadata=metadata),
    ):
        with pytest.raises(grpc.aio.AioRpcError):
            await call

    def count(route: str, status: int) -> float | None:
        labels = {"protocol": "open_inference_grpc", "route": route, "status": str(status)}
        registry = gateway.telemetry.instruments.registry
        found: float | None = registry.get_sample_value("heliostat_requests_total", labels)
        return found

    # A client may hear of an error a moment before it is counted.
    async with asyncio.timeout(5):
        while count("unmatched", 401) is None or count("unmatched", 501) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert count("ModelInfer", 200) == 1
    assert count("ModelStreamInfer", 200) == 1
    assert count("ModelInfer", 404) == 1
    assert count("unmatched", 401) == 1
    assert count("unmatched", 501) == 1
    answered = gateway.telemetry.instruments.registry.get_sample_value(
        "heliostat_model_request_duration_seconds_count", {"model": "classes", "version": "2"}
    )
    assert answered == 2


async def one_request() -> AsyncIterator[Any]:
    yield infer_request()


async def test_each_request_of_a_stream_is_written_down_by_itself(
    gateway: Any, channel: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    metadata = (*gateway.headers().items(), ("x-request-id", "mine"))

    async def requests() -> AsyncIterator[Any]:
        yield infer_request()
        yield infer_request("absent")
        await asyncio.sleep(0.3)
        yield infer_request("classes@previous")

    with caplog.at_level("INFO", logger="heliostat.access"):
        answers = [a async for a in stub.ModelStreamInfer(requests(), metadata=metadata)]
    assert [bool(answer.error_message) for answer in answers] == [False, True, False]
    found = [r for r in caplog.records if r.name == "heliostat.access"]
    first, absent, last = (record.__dict__ for record in found)
    assert [r["request_id"] for r in (first, absent, last)] == ["mine", "mine-2", "mine-3"]
    assert [r["status"] for r in (first, absent, last)] == [200, 404, 200]
    assert (first["model_version"], last["model_version"]) == ("classes/2", "classes/1")
    assert "model_version" not in absent
    assert absent["error"] == "not_found"
    assert last["duration_ms"] < 300, "what the client waited before it asked is not counted"
    registry = gateway.telemetry.instruments.registry
    for version in ("1", "2"):
        labels = {"model": "classes", "version": version}
        name = "heliostat_model_request_duration_seconds_count"
        assert registry.get_sample_value(name, labels) == 1
