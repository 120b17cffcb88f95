"""The products of INT4 weights without a GPU: their kernels run one instruction at a time, and which of them serves."""

import shutil
from functools import partial

import ptx
import pytest
import torch
from kernel_checks import plus_layer

import kernels
from runtime import cuda, products

TILES = {"tiled": cuda.Tile(32, 64, WM=16), "tiled, long": cuda.Tile(32, 64, 256, 3),
         "tiled, wide": cuda.Tile(64, 64, WM=64, STAGES=3), "grouped": cuda.Grouped(128, 128, STAGES=3),
         "grouped, wide": cuda.Grouped(128, 256), "grouped, tall": cuda.Grouped(256, 128)}


@pytest.fixture
def launch(monkeypatch):
    """Kernels run on the CPU, from the compiler's PTX."""
    if not shutil.which("nvcc") and not ptx.nvrtc():
        pytest.skip("needs nvcc or NVRTC (pip install nvidia-cuda-nvrtc)")
    launch = ptx.launcher()
    monkeypatch.setattr(cuda, "_launch", launch)
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: 4)
    monkeypatch.setattr(cuda, "ready", lambda *_: True)
    cuda._counters.cache_clear()
    return launch


def paired(codes):
    """In every 32 channels the even ones before the odd ones."""
    return codes.unflatten(-1, (-1, 16, 2)).transpose(-2, -1).reshape(codes.shape).contiguous()


def check_tile(tile, M, K, N, dtype, splits=1, asymmetric=False, has_bias=False, shifted=False, extreme=False):
    """A product by `tile` against its formula, every output equal; the counters that its blocks meet at are 0 again."""
    g = torch.Generator().manual_seed(M + N)
    codes = torch.zeros(kernels._multiple(M, 32), K, dtype=torch.int8)
    codes[:M] = torch.randint(-128 if extreme else -8, 128 if extreme else 8, (M, K), generator=g)
    w = torch.randint(-8, 8, (N, K), generator=g, dtype=torch.int8)
    if extreme:  # the largest sum there is
        codes[0], w[0] = -128, -8
    scale, zero = torch.rand(M, generator=g), torch.randint(-8, 8, (M,), generator=g, dtype=torch.int32)
    w_scale, w_sum, state = torch.rand(N, generator=g), kernels.row_sums(w), torch.rand(M, generator=g) < 0.5
    w_zero = torch.randint(-8, 8, (N,), generator=g, dtype=torch.int32) if asymmetric else None
    bias = torch.randn(N, generator=g) if has_bias else None
    shift = torch.randn(2, N, generator=g) if shifted else None
    x_sum = codes[:M].sum(-1, dtype=torch.int32) - K * zero if asymmetric else None
    y = torch.full((M, N), torch.nan, dtype=dtype)
    cuda.tiled_product(tile._replace(splits=splits), paired(codes), kernels.pack_int4(w), scale, zero, x_sum, w_scale,
                       w_sum, w_zero, bias, y, shift, state)
    acc = kernels.float_mm(codes[:M], w) - zero[:, None] * w_sum
    acc = acc - x_sum[:, None] * w_zero if asymmetric else acc
    want = acc.float() * scale[:, None] * w_scale
    want = want + bias if has_bias else want
    want = want + shift[state.long()] if shifted else want
    assert torch.equal(y, want.to(dtype))
    assert not cuda._counters(y.device).any()


class TestTiles:
    @pytest.mark.parametrize(("name", "dtype"), [(name, torch.bfloat16) for name in TILES] + [
        ("tiled", torch.float32), ("grouped", torch.float32)])
    def test_ragged_with_everything(self, launch, name, dtype):
        tile = TILES[name]
        check_tile(tile, tile.TM + 1, 512, tile.TN + 16, dtype, 1, True, True, True)
        assert not launch.conflicts[cuda.PRODUCTS[tile.part][0]]

    @pytest.mark.parametrize("splits", [2, 3])
    @pytest.mark.parametrize("name", ["tiled", "grouped"])
    def test_blocks_that_share_out_the_channels(self, launch, name, splits):
        check_tile(TILES[name], 33, 640, 48, torch.bfloat16, splits, shifted=True)

    @pytest.mark.parametrize("name", ["tiled", "grouped"])
    @pytest.mark.parametrize("K", [128, 256, 384])
    def test_fewer_channels_than_stages(self, launch, name, K):
        check_tile(TILES[name], 3, K, 16, torch.bfloat16, has_bias=True)

    @pytest.mark.parametrize("name", ["tiled", "grouped"])
    def test_extreme_codes_of_8_bits(self, launch, name):
        check_tile(TILES[name], 5, 512, 32, torch.bfloat16, extreme=True)

    @pytest.mark.parametrize(("name", "old", "new"), [
        # values
        ("tiled", "4 & 0xf0f0f0f0u, odd", "4 & 0xf0f0f0e0u, odd"),
        ("grouped", "a[i / 2 * 4 + i % 2 * 2 + s]", "a[i / 2 * 4 + i % 2 * 2 + 1 - s]"),
        ("grouped", "where + 2 * s", "where + 4 * s"), ("grouped", "if (m >= M) continue;", ""),
        ("tiled", "more.x; c[4 * i + 1]", "0; c[4 * i + 1]"), ("tiled", "ended[tile] = 0", "ended[tile] = 1"),
        # races, which values alone may not show
        ("tiled", 'memory");\n        __syncthreads();', 'memory");'), ("tiled", '"n"(STAGES - 2)', '"n"(STAGES - 1)'),
        ("tiled", "fetch(step + STAGES - 1);", "fetch(step + STAGES - 2);"),
        ("grouped", '"n"(STAGES - 3)', '"n"(STAGES - 2)'),
        ("grouped", "unpack(step + 1, next)", "unpack(step + 1, now)"),
        ("grouped", 'asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");\n    };', "};")])
    def test_planted_faults_are_found(self, launch, monkeypatch, tmp_path, name, old, new):
        text, changed = cuda.PRODUCTS_SOURCE.read_text(), tmp_path / "products.cu"
        assert old in text
        changed.write_text(text.replace(old, new))
        monkeypatch.setattr(cuda, "PRODUCTS_SOURCE", changed)
        with pytest.raises((ptx.Fault, AssertionError)):
            check_tile(TILES[name], 33, 1024, 32, torch.bfloat16, 2)


def test_fp8_codes_and_weights(launch):
    assert cuda.self_check(torch.device("cpu"), torch.bfloat16, "fp8") is None


@pytest.mark.parametrize("order", cuda.ORDERS)
@pytest.mark.parametrize("feedback", [False, True])
def test_codes_in_the_order_of_a_product(launch, order, feedback):
    g = torch.Generator().manual_seed(0)
    x, V = torch.randn(5, 128, generator=g), 0.1 * torch.randn(2, 64, 64, generator=g).bfloat16()
    codes, _, zero = cuda.token_codes(x, None, 0, 0, 4, None, V if feedback else None, order)
    plain, *_ = cuda.token_codes(x, None, 0, 0, 4, None, V if feedback else None)
    want = {"plain": plain, "paired": paired(plain)}.get(order)
    if order == "e4m3":
        assert codes.dtype == torch.float8_e4m3fn
        codes, want = codes[:5].float(), (plain[:5] - zero[:, None]).float()
    assert torch.equal(codes, want)


def test_a_whole_linear_of_starquant_plus_by_every_product(launch, monkeypatch):
    """Centre, blocks, clip, feedback, bias and the mean's output. fp8 rounds the product before it adds the latter."""
    linear, g = plus_layer(), torch.Generator().manual_seed(1)
    x, state = torch.randn(2, 5, 128, generator=g).bfloat16(), torch.rand(2, 5, generator=g) < 0.5
    every = {"slices": products.Way("slices", "plain", products._in_slices),
             "fp8": products.Way("fp8", "e4m3", products._by_fp8)} | {
        name: products.Way(name, "paired", partial(products._by_tiles, TILES[name])) for name in ("tiled", "grouped")}
    y = {}
    for name, way in every.items():
        monkeypatch.setattr(products, "ways", lambda *_, way=way: [way])
        y[name] = products.linear(linear, x, state)
        assert name == "fp8" or torch.equal(y[name], y["slices"])
    shift = linear.bias + linear.shift[state.long()]
    assert torch.allclose(y["fp8"].float(), y["slices"].float(), rtol=2**-7, atol=2**-7 * shift.abs().max())


class TestFastest:
    @pytest.fixture(autouse=True)
    def timed(self, monkeypatch):
        monkeypatch.setattr(products, "_FASTEST", {})
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(products, "_gpu_seconds", lambda way, device: self.timings.append(way) or way())
        self.timings = []

    def test_the_fastest_one_is_kept_for_its_shape(self):
        calls, key = {"a": lambda: 2.0, "b": lambda: 1.0}, ("cuda", torch.float32, 32, 96, 128, True)
        assert products.fastest(calls, key) == "b"
        assert self.timings == list(calls.values())
        assert products.fastest(calls, key) == "b"
        assert len(self.timings) == 2
        later = {"a": lambda: 1.0, "b": lambda: 2.0}
        assert products.fastest(later, (*key[:2], 64, *key[3:])) == "a"
        assert products.fastest(later, key) == "b"  # as its shape was
        assert products.chosen() == {"32 x 128 -> 96, packed": "b", "64 x 128 -> 96, packed": "a"}

    def test_one_way_needs_no_clock(self):
        assert products.fastest({"only": object()}, "key") == "only"
        assert not self.timings

    def test_nothing_is_timed_while_a_graph_is_recorded(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert products.fastest({"a": lambda: 1.0, "b": lambda: 2.0}, ("cuda",)) == "b"  # the one that always serves
        assert not self.timings
        assert not products._FASTEST  # and nothing is kept that was not timed

    def test_a_way_without_memory_is_not_taken(self):
        def fails():
            raise torch.OutOfMemoryError

        assert products.fastest({"a": fails, "b": lambda: 2.0}, ("cuda", 1)) == "b"
        assert products.fastest({"a": lambda: 2.0, "b": fails}, ("cuda", 2)) == "a"
        assert products.fastest({"a": fails, "b": fails}, ("cuda", 3)) == "b"


def test_the_packed_product_is_for_few_tokens_whole_chunks_and_gpus(monkeypatch):
    class Rows:
        dtype = torch.bfloat16

        def __init__(self, M, K, is_cuda=True):
            self.shape, self.is_cuda, self.device = (M, K), is_cuda, torch.device("cuda", 0)

    asked = []
    monkeypatch.setattr(cuda, "ready", lambda index, dtype, part: asked.append((index, dtype, part)) or True)
    assert products.few(Rows(products.FEW, 4096), 4096)
    assert asked == [(0, torch.bfloat16, "packed")]
    for rows, N in ((Rows(products.FEW + 1, 4096), 4096), (Rows(32, 4160), 4096), (Rows(32, 4096), 4112),
                    (Rows(32, 4096, False), 4096)):
        assert not products.few(rows, N)
    assert len(asked) == 1  # nothing is compiled that cannot serve
    monkeypatch.setattr(cuda, "ready", lambda *_: False)
    assert not products.few(Rows(32, 4096), 4096)
