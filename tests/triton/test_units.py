"""Units of codes: kernels and their assembly against each other, and against the layout."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from csrc_triton import units
from tests.support import ptx
from think_vllm.kernels.reference.quantization import (
    from_units,
    read_matrix,
    to_units,
    write_matrix,
)
from think_vllm.plan.formats import FORMATS
from think_vllm.plan.layout import BlockForm, ThinLayout

ASM = {8: units._FP8, 4: units._INT4, 2: units._INT2}


@triton.jit
def unpack_kernel(
    word_ptr, factor_ptr, out_ptr, SIZE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr
):
    index = tl.arange(0, SIZE)[None, :]
    numbers = units.unpack_words(
        tl.load(word_ptr + index), tl.load(factor_ptr + index), BITS, tl.float16, ASM
    )
    place = tl.arange(0, 32 // BITS)[None, None, :]
    tl.store(out_ptr + index[:, :, None] * (32 // BITS) + place, numbers)


def unpack(device, words: np.ndarray, factors: np.ndarray, bits: int) -> np.ndarray:
    """uint32 words [X] and factors [X] -> float16 [X, columns, 2], on a GPU or interpreted."""
    out = torch.empty(words.size, 32 // bits, dtype=torch.float16, device=device)
    given = [torch.from_numpy(values.view(np.int32).copy()) for values in (words, factors)]
    given = [values.to(device) for values in given]
    unpack_kernel[(1,)](*given, out, words.size, bits, not triton.knobs.runtime.interpret)
    return out.cpu().view(words.size, -1, 2).numpy()


def run_assembly(words: np.ndarray, factors: np.ndarray, bits: int) -> np.ndarray:
    scales, zeros = (np.repeat(factors[i::2], 2) for i in range(2))

    def less(offset: int) -> np.ndarray:
        return ptx.run(
            "{" + units._OFFSET.value + "}", 1, [scales, zeros, np.full_like(words, offset % 2**32)]
        )[0]

    inputs = {
        8: lambda: [words],
        4: lambda: [words, scales, less(units.LESS_16.value)],
        2: lambda: [words, scales, less(units.LESS_4.value)],
    }[bits]()
    halves = ptx.run(ASM[bits].value, 32 // bits, inputs)
    numbers = np.stack(halves, axis=1).astype(np.uint16).view(np.float16)
    return numbers.reshape(words.size, -1, 2)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_assembly_computes_what_kernels_do(device, bits):
    generator = np.random.default_rng(bits)
    size = 4096
    words = generator.integers(0, 2**32, size, dtype=np.uint32)
    # Scales and zeros as quantization makes them: of groups from 1e-3 to 3e4 wide.
    width = np.exp(generator.uniform(np.log(1e-3), np.log(3e4), (size // 2, 2)))
    scales = (width / (2**bits - 1)).astype(np.float16)
    zeros = (-width * generator.uniform(0, 1, width.shape)).astype(np.float16)
    factors = np.stack([scales, zeros], axis=1).reshape(-1).view(np.uint32)
    made = unpack(device, words, factors, bits).astype(np.float64)
    assembled = run_assembly(words, factors, bits).astype(np.float64)
    # The interpreter rounds to float32 before: the last bit of few numbers may differ.
    assert np.mean(made != assembled) < 1e-3
    np.testing.assert_allclose(made, assembled, rtol=2**-10, atol=2**-24)
    expected = words[:, None, None] >> (
        16 * np.arange(2)[None, None, :] + bits * np.arange(16 // bits)[None, :, None]
    ).astype(np.uint32)
    codes = (expected & (2**bits - 1)).astype(np.float64)
    if bits == 8:
        as_fp8 = torch.from_numpy((expected & 0xFF).astype(np.uint8)).view(torch.float8_e4m3fn)
        exact = as_fp8.double().numpy() / 256
        is_number = ~np.isnan(exact)  # 0x7F and 0xFF, which nothing stores
        np.testing.assert_array_equal(assembled[is_number], exact[is_number])
    else:
        pairs = [np.repeat(x.astype(np.float64), 2, axis=0)[:, None, :] for x in (scales, zeros)]
        exact = pairs[1] + codes * pairs[0]
        # The offset of 16 costs a few bits of a number's, far less than a step of the codes.
        assert np.max(np.abs(assembled - exact) / pairs[0]) < 0.02
        assert np.isfinite(assembled).all()


def test_units_interleave_two_rows():
    # Two pairs of rows, five units each. Byte b of row r is 0x20 r + b.
    codes = (torch.arange(4)[:, None] * 0x20 + torch.arange(20)).to(torch.uint8)
    made = to_units(codes)
    assert made.shape == (5, 2, 8)
    assert made[0, 0].tolist() == [0x00, 0x01, 0x20, 0x21, 0x02, 0x03, 0x22, 0x23]
    assert made[4, 1].tolist() == [0x50, 0x51, 0x70, 0x71, 0x52, 0x53, 0x72, 0x73]
    assert torch.equal(from_units(made), codes)


@pytest.mark.parametrize("name", ["fp8", "kivi4", "k4v2", "kivi2"])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_both_forms_hold_the_same_numbers_in_the_same_bytes(name, which):
    layout = getattr(ThinLayout(64, 30, 48, 32, 2, FORMATS[name]), which)
    matrix = torch.randn(layout.rows, layout.columns, generator=torch.Generator().manual_seed(0))
    runs, read = [], []
    for form in BlockForm:
        run = torch.full((8192,), 0xFF, dtype=torch.uint8)
        write_matrix(run, matrix.bfloat16(), layout, form)
        read.append(read_matrix(run, layout, *matrix.shape, torch.bfloat16, form))
        assert (run[: layout.offset] == 0xFF).all()
        assert (run[layout.end :] == 0xFF).all()
        runs.append(run)
    assert torch.equal(*read)
    assert torch.equal(runs[0].sort().values, runs[1].sort().values)
    assert not torch.equal(*runs)
