"""The products of INT4 weights without a GPU: their kernels run one instruction at a time, and which of them serves."""

from functools import partial
from types import SimpleNamespace

import ptx
import pytest
import torch
from kernel_checks import check_tile, paired, plant, plus_layer

from runtime import cuda, products

TILES = {"tiled": cuda.Tile(32, 64, WM=16), "4 bits": cuda.Tile(32, 64, WM=16, NIBBLES=1),
         "4 bits, wide": cuda.Tile(64, 64, WM=64, STAGES=3, NIBBLES=1), "tiled, long": cuda.Tile(32, 64, 256, 3),
         "tiled, wide": cuda.Tile(64, 64, WM=64, STAGES=3), "grouped": cuda.Tile(128, 128, STAGES=3, GROUPS=2),
         "grouped, wide": cuda.Tile(128, 256, GROUPS=2), "grouped, tall": cuda.Tile(256, 128, GROUPS=2)}


@pytest.fixture
def launch():
    """Kernels run on the CPU, from the compiler's PTX."""
    with ptx.interpreted(4) as launch:
        yield launch


class TestTiles:
    @pytest.mark.parametrize(("name", "dtype"), [(name, torch.bfloat16) for name in TILES] + [
        ("tiled", torch.float32), ("grouped", torch.float32)])
    def test_ragged_with_everything(self, launch, name, dtype):
        tile = TILES[name]
        check_tile("cpu", tile, tile.TM + 1, 512, tile.TN + 16, dtype, 1, True, True, True, True)
        assert not launch.conflicts[tile.kernel]

    @pytest.mark.parametrize("splits", [2, 3])
    @pytest.mark.parametrize("name", ["tiled", "4 bits", "grouped"])
    def test_blocks_that_share_out_the_channels(self, launch, name, splits):
        check_tile("cpu", TILES[name], 33, 640, 48, torch.bfloat16, splits, shifted=True)

    @pytest.mark.parametrize("name", ["tiled", "grouped"])
    @pytest.mark.parametrize("K", [128, 256, 384])
    def test_fewer_channels_than_stages(self, launch, name, K):
        check_tile("cpu", TILES[name], 3, K, 16, torch.bfloat16, has_bias=True)

    @pytest.mark.parametrize("name", ["tiled", "grouped"])
    def test_extreme_codes_of_8_bits(self, launch, name):
        check_tile("cpu", TILES[name], 5, 512, 32, torch.bfloat16, extreme=True)

    @pytest.mark.parametrize(("name", "old", "new"), [
        # values
        ("tiled", "w0 << 4 & 0xf0f0f0f0u", "w0 << 4 & 0xf0f0f0e0u"), ("4 bits", "| v[2] << 4", "| v[3] << 4"),
        ("4 bits", "w1 = b[NIBBLES]", "w1 = b[0]"), ("4 bits", "2 * (s + h) + lane / 16", "2 * s + lane / 16"),
        ("grouped", "a[i / 2 * 4 + i % 2 * 2 + s]", "a[i / 2 * 4 + i % 2 * 2 + 1 - s]"),
        ("grouped", "where + 2 * s", "where + 4 * s"), ("grouped", "if (m >= M) continue;", ""),
        ("tiled", "more.x; c[4 * i + 1]", "0; c[4 * i + 1]"), ("tiled", "ended[tile] = 0", "ended[tile] = 1"),
        ("grouped", "load<OWN>(residual + (long long)m * N + n", "load<OWN>(residual + n"),
        # races, which values alone may not show
        ("tiled", 'memory");\n        __syncthreads();', 'memory");'), ("tiled", '"n"(STAGES - 2)', '"n"(STAGES - 1)'),
        ("tiled", "ask(step + STAGES - 1);", "ask(step + STAGES - 2);"),
        ("grouped", '"n"(STAGES - 3)', '"n"(STAGES - 2)'),
        ("grouped", "unpack(step + 1, next)", "unpack(step + 1, now)"),
        ("grouped", 'asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");\n    };', "};")])
    def test_planted_faults_are_found(self, launch, monkeypatch, tmp_path, name, old, new):
        plant(monkeypatch, tmp_path, old, new)
        with pytest.raises((ptx.Fault, AssertionError)):
            check_tile("cpu", TILES[name], 33, 1024, 32, torch.bfloat16, 2, added=True)


@pytest.mark.parametrize("order", cuda.ORDERS)
@pytest.mark.parametrize("feedback", [False, True])
def test_codes_in_the_order_of_a_product(launch, order, feedback):
    g = torch.Generator().manual_seed(0)
    x, V = torch.randn(5, 128, generator=g), 0.1 * torch.randn(2, 64, 64, generator=g).bfloat16()
    layer = SimpleNamespace(basis=lambda x: [], mean=None, feedback=V if feedback else None, d_m=0, d_u=0, abits=4,
                            clip=None)
    codes, _, zero = products.codes(layer, x, None, order)
    plain, *_ = products.codes(layer, x, None)
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
        residual = torch.randn(y[name].shape, generator=g).bfloat16()
        assert torch.equal(products.linear(linear, x, state, residual=residual), y[name] + residual)
    shift = linear.bias + linear.shift[state.long()]
    assert torch.allclose(y["fp8"].float(), y["slices"].float(), rtol=2**-7, atol=2**-7 * shift.abs().max())


def test_the_kernels_serve_whole_tiles_of_outputs_and_of_feedback(monkeypatch):
    asked = []
    monkeypatch.setattr(products.checks, "usable", lambda x, *parts: asked.append(parts) or True)

    def served(C, block=None, d=64):
        V = block and torch.zeros(1, block, block)
        return products.serves(SimpleNamespace(in_features=d, weight_scale=torch.ones(C), feedback=V), None)

    # a block asks about `down` with its own input, which may be wider or narrower
    assert [served(32, d=32), served(32, d=24)] == [True, False]
    asked.clear()
    assert [served(16), served(48), served(24), served(8)] == [True, True, False, False]
    assert [served(32, 64), served(24, 64), served(32, 32), served(32, 128)] == [True, False, False, False]
    assert asked == [("linear",), ("linear",), ("linear", "feedback")]


@pytest.mark.parametrize(("M", "tiled"), [(2**20 - 1, True), (2**20, False)])
def test_tiles_serve_activations_that_32_bits_count(M, tiled, monkeypatch):
    monkeypatch.setattr(products.checks, "ready", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    x = SimpleNamespace(shape=(M, 2048), device=torch.device("cuda", 0), is_cuda=True, dtype=torch.bfloat16)
    layer = SimpleNamespace(packed=True, abits=8, wbits=4, weight_zero=None, in_features=2048)
    *tiles, last = products.ways(layer, x)
    assert (bool(tiles), last.name) == (tiled, "slices")


@pytest.mark.parametrize("abits", [2, 4, 5, 8])
def test_only_codes_of_4_bits_are_packed_in_registers(abits, monkeypatch):
    monkeypatch.setattr(products.checks, "ready", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    x = SimpleNamespace(shape=(512, 2048), device=torch.device("cuda", 0), is_cuda=True, dtype=torch.float32)
    found = products.ways(SimpleNamespace(packed=True, abits=abits, wbits=4, weight_zero=None, in_features=2048), x)
    assert ("tiled 128 of 4 bits" in [way.name for way in found]) == (abits <= 4)


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


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_a_tile_serves_any_number_of_tokens_on_every_gpu_with_its_instructions(capability):
    for M in (1, 32, 128, 129, 4096):
        names = [name for name, tile in cuda.TILES.items() if products.suits(tile, M, capability)]
        assert ("tiled 32" in names) == (M <= 128)
        assert ("tiled 128" in names) == (M >= 64)
        assert ("tiled 128 of 4 bits" in names) == (M >= 64 and capability[0] == 8)
        assert ("grouped" in names) == (M >= 64 and capability == (9, 0))
    assert all(tile.shared < 100 * 1024 for tile in cuda.TILES.values() if not tile.GROUPS)  # of an RTX 3090 or 4090
    assert not any(products.suits(tile, 32, (7, 5)) for tile in cuda.TILES.values())


def test_slices_fit_the_cache(monkeypatch):
    """Of an H100 and of an A40: their L2 caches hold 50 and 6 MB."""
    for L2, multiprocessors in ((50 * 2**20, 132), (6 * 2**20, 84)):
        wave, part = multiprocessors * 128 * 128, L2 // 4
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, n=multiprocessors, L2=L2: SimpleNamespace(
            multi_processor_count=n, L2_cache_size=L2))
        for M in (32, 128, 1024, 4096):
            for N, K in ((12288, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (126464, 4096), (37888, 3584)):
                for packed in (True, False):
                    width = products.slice_width(M, N, K, packed, "cuda")
                    assert 0 < width <= N
                    assert width == N or width % 256 == 0
                    busy = M * width <= wave  # narrower slices would leave multiprocessors idle
                    assert width in (N, 256) or busy or 4 * M * width <= part
                    assert width in (N, 256) or busy or not packed or K * width <= part
                    assert width == N or (width + 256) * M > wave
