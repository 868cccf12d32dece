"""The bytes of a shard, written out. A change here is a new format version."""

from __future__ import annotations

import json

import numpy as np
import pytest
from crc32c import crc32c
from safetensors.numpy import load

from capture.store import ShardLayout, Staging, Tensor, TensorTable
from capture.store.shard import checksums

TINY = TensorTable(
    parameters=(
        Tensor("w", (2, 2), "F32", 0, ("tied",)),
        Tensor("s", (), "BF16", 0),
    ),
    buffers=(Tensor("n", (), "I64"), Tensor("m", (3,), "BOOL")),
)


def test_a_shard_of_weights_byte_by_byte():
    staging = Staging(ShardLayout("weights", TINY))
    staging.parameters[:] = [1.0, -2.0, 0.5, np.inf, 3.0]
    staging.buffers["n"][:] = np.array([7], "<i8").view(np.uint8)
    staging.buffers["m"][:] = [1, 0, 1]
    chunks, rest = staging.seal(12)

    header = (
        b'{"__metadata__":{"format":"pt","straightway":"1","stream":"weights","step":"12",'
        b'"aliases":"{\\"tied\\":\\"w\\"}"},'
        b'"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
        b'"s":{"dtype":"F32","shape":[],"data_offsets":[16,20]},'
        b'"__straightway__.padding":{"dtype":"U8","shape":[44],"data_offsets":[20,64]},'
        b'"n":{"dtype":"I64","shape":[],"data_offsets":[64,72]},'
        b'"m":{"dtype":"BOOL","shape":[3],"data_offsets":[72,75]},'
        b'"__straightway__.index":{"dtype":"U8","shape":[20],"data_offsets":[75,95]}}'
    )
    expected = b"".join(
        [
            # The length of the header: 504 = 512 - 8. Room is kept for a step of 19 digits, and
            # the data start at a multiple of 64.
            bytes.fromhex("f801000000000000"),
            header + b" " * (504 - len(header)),
            bytes.fromhex("0000803f 000000c0 0000003f 0000807f"),  # w: 1, -2, 0.5, inf
            bytes.fromhex("00004040"),  # s: 3, widened to float32
            bytes(44),  # padding: the inner chunk holds 16 elements
            bytes.fromhex("0700000000000000"),  # n: 7
            bytes.fromhex("010001"),  # m: True, False, True
            bytes.fromhex("0002000000000000 4000000000000000"),  # index: offset 512, 64 bytes
            bytes.fromhex("daab6d97"),  # crc32c of those 16 bytes
        ]
    )
    assert staging.image.tobytes() == expected
    assert len(expected) == staging.layout.size == 512 + 64 + 8 + 3 + 20
    assert (chunks, rest) == (["7a0ae1d4"], "871ca4ad")


def test_a_shard_with_a_batch_byte_by_byte():
    table = TensorTable((Tensor("v", (16,), "F64", 0),), TINY.buffers)
    staging = Staging(ShardLayout("fixed", table, batches=3))
    staging.parameters[:] = np.arange(16)
    staging.seal(5, 2)
    header = (
        b'{"__metadata__":{"format":"pt","straightway":"1","stream":"fixed","step":"5",'
        b'"batch":"2"},"v":{"dtype":"F64","shape":[16],"data_offsets":[0,128]},'
        # No padding: 16 coordinates fill the chunk. No buffers: they are with the weights.
        b'"__straightway__.index":{"dtype":"U8","shape":[20],"data_offsets":[128,148]}}'
    )
    index = bytes.fromhex("4001000000000000 8000000000000000")  # offset 320, 128 bytes
    assert staging.image.tobytes() == b"".join(
        [
            bytes.fromhex("3801000000000000"),  # 312 = 320 - 8
            header + b" " * (312 - len(header)),
            *(np.float64(number).tobytes() for number in range(16)),
            index,
            crc32c(index).to_bytes(4, "little"),
        ]
    )


def test_crc32c_is_the_castagnoli_checksum():
    # The check value of CRC-32C in the catalogue of parametrised CRC algorithms.
    assert crc32c(b"123456789") == 0xE3069283


def test_the_header_has_one_length_for_every_step_and_batch():
    layout = ShardLayout("fixed", TINY, batches=4)
    headers = [layout.header(step, batch) for step in (0, 9, 2**63 - 1) for batch in (0, 3)]
    assert {len(header) for header in headers} == {layout.data_start}
    assert layout.data_start % 64 == 0


def test_any_byte_outside_the_padding_and_the_chunks_is_in_the_rest():
    staging = Staging(ShardLayout("weights", TINY))
    chunks, rest = staging.seal(0)
    layout = staging.layout
    for position in range(layout.size):
        image = staging.image.copy()
        image[position] ^= 1
        changed = checksums(image, layout.data_start, layout.grid)
        in_chunk = layout.data_start <= position < layout.value_end
        assert (changed[0] != chunks) == in_chunk
        assert (changed[1] != rest) == (not in_chunk)


def test_a_reused_buffer_leaves_no_trace_of_the_step_before(sample):
    layout = ShardLayout("weights", sample.TABLE)
    reused, fresh = Staging(layout), Staging(layout)
    sample.fill(reused, 10**15)
    reused.seal(10**15)
    for staging in (reused, fresh):
        sample.fill(staging, 3)
        staging.seal(3)
    assert reused.image.tobytes() == fresh.image.tobytes()


@pytest.mark.parametrize("stream", ["weights", "minibatch"])
def test_safetensors_reads_the_image_as_it_is(sample, stream):
    # numpy has no bfloat16, so its reader gets a table without such a buffer.
    table = TensorTable(sample.TABLE.parameters, sample.TABLE.buffers[:3])
    staging = Staging(ShardLayout(stream, table))
    sample.fill(staging, 1)
    staging.seal(1)
    tensors = load(staging.image.tobytes())
    named = list(json.loads(staging.image[8 : staging.layout.data_start].tobytes()))
    assert set(tensors) == set(named) - {"__metadata__"}
    buffers = {"mask", "bn.num_batches_tracked", "bn.running_mean"}
    assert (buffers <= set(tensors)) == (stream == "weights")
