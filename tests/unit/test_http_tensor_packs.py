"""`http-binary` requests: the two parts, the pack in both codecs, and every way in which they can be wrong."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
from typing import Any

import numpy as np
import pytest
import zstandard
from http_client import a_model, refusal
from http_fakes import FakeService
from http_serving import calling, face
from hypothesis import given, settings
from hypothesis import strategies as st
from test_http_training import MODEL_ID

from weaver_rl.errors import ServiceError
from weaver_rl.service.calls import TrainingCall
from weaver_rl.service.config import HttpConfig
from weaver_rl.service.http.decoding import Decoded, DecodeJob, Refusal, decode
from weaver_rl.service.http.tensor_packs import CHUNK_BYTES, packed_array, read_packed

pytestmark = pytest.mark.unit

BOUNDARY = "weaver-boundary"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
LIMIT_BYTES = 1 << 20
TOKENS, TARGETS = np.array([5, 9, 6]), np.array([9, 6, 2])
WEIGHTS = np.array([0.0, 1.0, 0.5], np.float32)


def in_pack(offset: int, array: np.ndarray[Any, Any], /, **changes: Any) -> dict[str, Any]:
    described = {
        "format": "raw-tensor",
        "codec": "raw",
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "offset": offset,
        "size_bytes": array.nbytes,
    }
    return {"$tensor": described | changes}


def request(model_id: str = MODEL_ID, **changes: Any) -> dict[str, Any]:
    datum = {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": in_pack(0, TOKENS)}]},
        "loss_fn_inputs": {"target_tokens": in_pack(24, TARGETS), "weights": in_pack(48, WEIGHTS)},
    }
    asked = {"loss_fn": "cross_entropy", "data": [datum]}
    payload = {"model_id": model_id, "seq_id": 3, "tensor_transport": "http-binary", "tensor_compression": "zstd"}
    return {"payload": payload | {"forward_backward_input": asked} | changes}


PACK = TOKENS.tobytes() + TARGETS.tobytes() + WEIGHTS.tobytes()


def zstd(content: bytes, **options: Any) -> bytes:
    """As the SDK does it: streamed, so that the frame does not say its size."""
    packer = zstandard.ZstdCompressor(level=3, **options).compressobj()
    return packer.compress(content) + packer.flush()


def manifest_of(wire: bytes, decoded: bytes, used: str, /, asked: Any = None, **changes: Any) -> dict[str, Any]:
    said = {
        "size_bytes": len(wire),
        "sha256": hashlib.sha256(wire).hexdigest(),
        "codec": used,
        "decoded_size_bytes": len(decoded),
    }
    return {"version": 1, "request": request() if asked is None else asked, "tensor_pack": said | changes}


def part(name: str, content: bytes, boundary: str = BOUNDARY) -> bytes:
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\nContent-Type: a/b\r\n\r\n'
    return head.encode() + content + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()


def multipart(manifest: Any, wire: bytes) -> bytes:
    return part("manifest", json.dumps(manifest).encode()) + part("tensor_pack", wire) + END


def raw_body(**changes: Any) -> bytes:
    return multipart(manifest_of(PACK, PACK, "raw", **changes), PACK)


def zstd_body(wire: bytes | None = None, decoded: bytes = PACK, **changes: Any) -> bytes:
    sent = zstd(decoded) if wire is None else wire
    return multipart(manifest_of(sent, decoded, "zstd", **changes), sent)


def decoded(body: bytes, content_type: str = CONTENT_TYPE) -> TrainingCall | Refusal:
    result = decode(
        DecodeJob(body=body, content_type=content_type, model_id=MODEL_ID, backward=True, limit_bytes=LIMIT_BYTES)
    )
    return result.call if isinstance(result, Decoded) else result


@pytest.mark.parametrize("body", [raw_body(), zstd_body()], ids=["raw", "zstd"])
def test_both_codecs_give_the_arrays(body: bytes):
    call = decoded(body)
    assert isinstance(call, TrainingCall), call
    (datum,) = call.request.data
    np.testing.assert_array_equal(datum.token_ids_N, TOKENS)
    np.testing.assert_array_equal(datum.loss_fn_inputs["target_tokens"], TARGETS)
    np.testing.assert_array_equal(datum.loss_fn_inputs["weights"], WEIGHTS)
    assert call.seq_id == 3


def test_the_digest_is_of_the_content_and_not_of_the_boundary():
    calls = [decoded(raw_body()), decoded(raw_body().replace(BOUNDARY.encode(), b"other"), CONTENT_TYPE.replace(
        BOUNDARY, "other")), decoded(zstd_body())]  # fmt: skip
    digests = [call.digest for call in calls if isinstance(call, TrainingCall)]
    assert len(digests) == 3
    assert digests[0] == digests[1] != digests[2]


def over_the_limit() -> bytes:
    """A bomb: a megabyte and a byte out of a few bytes."""
    return zstd_body(decoded=bytes(LIMIT_BYTES + 1))


def lying_bomb() -> bytes:
    """One that says that it decodes to little."""
    sent = zstd(bytes(64 << 20))
    return multipart(manifest_of(sent, PACK, "zstd"), sent)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "must have the parts manifest and tensor_pack, in this order, and a last boundary; seen 0"),
        (b"garbage", "the multipart body cannot be read"),
        (part("manifest", b"{}") + END, "seen 1 part(s)"),
        (raw_body()[: -len(END) - 2], "cut off"),
        (raw_body()[:40], "cut off"),
        (part("tensor_pack", PACK) + part("manifest", b"{}") + END, "part 1 of the multipart body must be 'manifest'"),
        (part("manifest", b"{}") + part("manifest", b"{}") + END, "part 2 of the multipart body must be 'tensor_pack'"),
        (raw_body()[: -len(END)] + part("more", b"") + END, "more than the parts"),
        (raw_body().replace(b"Content-Disposition", b"Content-Something", 1), "part 1 of the multipart body must be"),
        (part("manifest", b"{") + part("tensor_pack", PACK) + END, "manifest: is no JSON"),
        (part("manifest", b"[]") + part("tensor_pack", PACK) + END, "manifest: "),
        (multipart(manifest_of(PACK, PACK, "raw") | {"version": 2}, PACK), "manifest.version: "),
        (multipart({"version": 1, "request": {}}, PACK), "manifest.tensor_pack: is missing"),
        (raw_body(codec="lz4"), "manifest.tensor_pack.codec: "),
        (raw_body(sha256="x"), "manifest.tensor_pack.sha256: "),
        (raw_body(sha256="0" * 64), "its SHA-256 is not that of the manifest"),
        (raw_body(size_bytes=len(PACK) - 1), f"has {len(PACK)} bytes, size_bytes says {len(PACK) - 1}"),
        (raw_body(size_bytes=-1), "manifest.tensor_pack.size_bytes: "),
        (raw_body(decoded_size_bytes=len(PACK) + 1), "codec raw, but decoded_size_bytes is not size_bytes"),
        (zstd_body(decoded_size_bytes=None), "decoded_size_bytes: is missing, and codec zstd needs it"),
        (zstd_body(decoded_size_bytes=len(PACK) + 1), f"decodes to {len(PACK)} bytes, decoded_size_bytes says"),
        (zstd_body(decoded_size_bytes=len(PACK) - 1), "decodes to more than decoded_size_bytes"),
        (zstd_body(PACK), "begins with no zstd frame"),
        (zstd_body(zstd(PACK)[:-1]), "its zstd frame is cut off"),
        (zstd_body(b""), "begins with no zstd frame"),
        (zstd_body(zstd(PACK) + b"x"), "something follows its zstd frame"),
        (zstd_body(zstd(PACK) + zstd(PACK)), "something follows its zstd frame"),
        (zstd_body(zstd(PACK) + bytes(5000)), "something follows its zstd frame"),
        (zstd_body(zstd(PACK)[:8] + b"\xff" * 40), "is no valid zstd frame"),
        (lying_bomb(), "decodes to more than decoded_size_bytes"),
    ],
)
def test_what_is_wrong_with_a_body_is_named(body: bytes, message: str):
    refused = decoded(body)
    assert isinstance(refused, Refusal)
    assert message in refused.error.message
    assert refused.error.status == 400


def test_a_pack_that_decodes_to_too_much_is_too_large():
    refused = decoded(over_the_limit())
    assert isinstance(refused, Refusal)
    assert refused.error.status == 413
    assert str(LIMIT_BYTES) in refused.error.message


def test_a_frame_with_a_checksum_is_checked():
    sent = zstd(PACK, write_checksum=True)
    assert isinstance(decoded(zstd_body(sent)), TrainingCall)
    refused = decoded(zstd_body(sent[:-1] + bytes([sent[-1] ^ 1])))
    assert isinstance(refused, Refusal)
    assert "no valid zstd frame" in refused.error.message


def test_no_boundary_is_named():
    refused = decoded(raw_body(), "multipart/form-data")
    assert isinstance(refused, Refusal)
    assert "names no boundary" in refused.error.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "pickle"}, "format and codec must be raw-tensor and raw"),
        ({"codec": "zstd"}, "format and codec must be raw-tensor and raw"),
        ({"dtype": "float16"}, "dtype: seen 'float16'; allowed: int64, int32, float32, float64"),
        ({"dtype": ["int64"]}, "dtype: seen"),
        ({"shape": 3}, "shape: must be a list"),
        ({"shape": [3.0]}, "shape[0]: must be an integer of at least 0"),
        ({"shape": [True]}, "shape[0]: must be an integer of at least 0"),
        ({"shape": [-3]}, "shape[0]: must be an integer of at least 0"),
        ({"shape": [1] * 9}, "shape: must be a list of at most 8"),
        ({"shape": [4]}, "shape [4] of float32 is not 12 bytes"),
        ({"dtype": "float64"}, "shape [3] of float64 is not 12 bytes"),
        ({"shape": [2**40, 2**40, 2**40]}, "is not 12 bytes"),
        ({"shape": [0, 2**61], "size_bytes": 0}, "do not have the shape"),
        ({"offset": 49}, "bytes 49 to 61 of a pack that has 60"),
        ({"offset": 2**61}, "of a pack that has 60"),
        ({"offset": -1}, "offset: must be an integer of at least 0"),
        ({"offset": "0"}, "offset: must be an integer of at least 0"),
        ({"size_bytes": 2**80}, "size_bytes: must be an integer"),
        ({"offset": None}, "offset: must be an integer"),
    ],
)
def test_what_is_wrong_with_a_tensor_is_named(changes: dict[str, Any], message: str):
    with pytest.raises(ServiceError) as caught:
        packed_array(in_pack(48, WEIGHTS, **changes), bytearray(PACK), "data[0].loss_fn_inputs.weights")
    assert message in caught.value.message
    assert caught.value.message.startswith("data[0].loss_fn_inputs.weights")


def test_slices_may_overlap_be_empty_and_unaligned():
    pack = bytearray(b"x" + WEIGHTS.tobytes())
    one, two = (packed_array(in_pack(1, WEIGHTS), pack, "w") for _ in range(2))
    np.testing.assert_array_equal(one, WEIGHTS)
    np.testing.assert_array_equal(two, WEIGHTS)
    assert packed_array(in_pack(0, np.empty(0, np.int64)), bytearray(), "w").shape == (0,)
    assert packed_array(in_pack(1, WEIGHTS, shape=[3, 1]), pack, "w").shape == (3, 1)
    tail = packed_array(in_pack(5, WEIGHTS[1:]), pack, "w")
    np.testing.assert_array_equal(tail, WEIGHTS[1:])


def test_not_finite_numbers_of_a_pack_are_named():
    pack = TOKENS.tobytes() + TARGETS.tobytes() + struct.pack("<3f", 1.0, float("nan"), 1.0)
    refused = decoded(multipart(manifest_of(pack, pack, "raw"), pack))
    assert isinstance(refused, Refusal)
    assert "datum 0: loss_fn_inputs.weights must be finite" in refused.error.message
    assert refused.seq_id == 3


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200), cut=st.integers(0, 400), noise=st.binary(max_size=8))
def test_bytes_survive_whatever_they_are_and_noise_is_refused(content: bytes, cut: int, noise: bytes):
    """Packs full of what looks like line ends and boundaries; and bodies with noise in them never crash."""
    pack = content + b"\r\n--" + content + BOUNDARY[:-1].encode() + b"\r\n" + content
    body = multipart(manifest_of(pack, pack, "raw", asked={"a": 1}), pack)
    assert read_packed(body, CONTENT_TYPE).pack(LIMIT_BYTES) == pack
    at = cut % len(body)
    result = decoded(body[:at] + noise + body[at + len(noise) :])
    assert isinstance(result, Refusal)


@pytest.mark.parametrize("around", [-3, -2, -1, 0, 1])
def test_a_boundary_across_two_pieces_of_the_body_is_found(around: int):
    manifest = manifest_of(b"", b"", "raw", asked={})
    empty = multipart(manifest, b"")
    padding = CHUNK_BYTES - empty.index(END) - around
    pack = b"\r" * padding
    body = multipart(manifest_of(pack, pack, "raw", asked={}), pack)
    assert read_packed(body, CONTENT_TYPE).pack(LIMIT_BYTES * 4) == pack


async def _over_http() -> None:
    service = FakeService()
    async with calling(face(service, http=HttpConfig(port=0, max_body_mb=1))) as client:
        model = await a_model(client)
        path = f"/api/v1/models/{model}/forward-backward-passes"
        headers = {"Content-Type": CONTENT_TYPE}
        for body in (raw_body(asked=request(model)), zstd_body(asked=request(model))):
            response = await client.post(path, content=body, headers=headers)
            assert response.status_code == 202, response.text
            (output,) = response.json()["response"]["result"]["loss_fn_outputs"]
            assert output["logprobs"] == in_pack(0, WEIGHTS)
        assert [call.digest for _, call in service.calls] == [
            hashlib.sha256(json.dumps(manifest_of(*packs, asked=request(model))).encode()).hexdigest()
            for packs in ((PACK, PACK, "raw"), (zstd(PACK), PACK, "zstd"))
        ]
        wrong = raw_body(asked=request(model, seq_id=4), sha256="0" * 64)
        refusal(await client.post(path, content=wrong, headers=headers), 400, "invalid_request")
        wrong = raw_body(asked=request(model, seq_id=5, forward_backward_input={}))
        refusal(await client.post(path, content=wrong, headers=headers), 400, "invalid_request")
        bomb = zstd_body(decoded=bytes(LIMIT_BYTES + 1), asked=request(model, seq_id=6))
        refusal(await client.post(path, content=bomb, headers=headers), 413, "request_too_large")
        assert service.skipped == [(model, seq_id) for seq_id in (4, 5, 6)]


def test_packs_over_http():
    asyncio.run(_over_http())
