"""How the basis P is initialized, allocated, kept orthogonal and trained (Appendix B)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods import sgat
from starquant import Kronecker, apply_basis, sgat_loss, state_gate

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def dense(P):
    return P.dense() if isinstance(P, Kronecker) else P


def deviation(P) -> float:
    """max |PᵀP − I|."""
    P = dense(P).double()
    return float((P.T @ P - torch.eye(len(P), dtype=torch.float64)).abs().max())


class TestStart:
    @given(n=sizes, seed=seeds)
    def test_random_orthogonal(self, n, seed):
        Q = sgat.random_orthogonal(n, generator(seed))
        assert Q.dtype == torch.float64
        assert deviation(Q) < 1e-12

    def test_haar_has_no_preferred_sign(self):
        """QR alone fixes the signs of R's diagonal; with them taken out, entries average to zero."""
        g = generator()
        corner = torch.stack([sgat.random_orthogonal(3, g) for _ in range(2000)]).mean(0)
        assert float(corner.abs().max()) < 0.06

    @given(d=st.integers(1, 5000))
    def test_kronecker_sizes(self, d):
        n1, n2 = sgat.kronecker_sizes(d)
        assert n1 * n2 == d
        assert min(n1, n2) == max(n for n in range(1, d + 1) if d % n == 0 and n * n <= d)
        assert n1 <= n2 or (n2 in (64, 128) and n1 not in (64, 128))

    @pytest.mark.parametrize(("d", "want"), [(4096, (64, 64)), (12288, (96, 128)), (18944, (148, 128)), (7, (1, 7))])
    def test_kronecker_sizes_of_real_models(self, d, want):
        assert sgat.kronecker_sizes(d) == want

    @pytest.mark.parametrize("kind", ["dense", "kronecker"])
    @pytest.mark.parametrize("d", [12, 48, 7])
    def test_initial_basis(self, kind, d):
        P = sgat.initial_basis(d, kind, generator())
        assert isinstance(P, Kronecker) == (kind == "kronecker")
        assert dense(P).shape == (d, d)
        assert deviation(P) < 1e-12
        assert torch.equal(dense(sgat.initial_basis(d, kind, generator())), dense(P))
        assert not torch.equal(dense(sgat.initial_basis(d, kind, generator(1))), dense(P))


class TestCayley:
    @given(n=sizes, seed=seeds, scale=st.floats(0.01, 10))
    def test_orthogonal_rotation(self, n, seed, scale):
        A = scale * torch.randn(n, n, generator=generator(seed), dtype=torch.float64)
        Q = sgat.cayley(A)
        assert deviation(Q) < 1e-10
        # (I + S) Q = I − S, with S the skew-symmetric part by numpy
        S = (A.numpy() - A.numpy().T) / 2
        np.testing.assert_allclose((np.eye(n) + S) @ Q.numpy(), np.eye(n) - S, atol=1e-9 * max(1, scale * n))
        assert float(torch.linalg.det(Q)) == pytest.approx(1)

    @pytest.mark.parametrize("n", [1, 2, 7])
    def test_the_written_out_gradient(self, n):
        A = torch.randn(n, n, generator=generator(), dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(sgat.cayley, A)

    def test_zero_gives_exactly_the_identity(self):
        assert torch.equal(sgat.cayley(torch.zeros(5, 5)), torch.eye(5))

    def test_symmetric_part_does_not_matter(self):
        A, B = torch.randn(2, 4, 4, generator=generator(), dtype=torch.float64)
        torch.testing.assert_close(sgat.cayley(A + B + B.T), sgat.cayley(A))


class TestOrthogonalBasis:
    @pytest.mark.parametrize("kind", ["dense", "kronecker"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_starts_exactly_at_its_start(self, kind, dtype):
        start = sgat.initial_basis(24, kind, generator())
        start = Kronecker(*(f.to(dtype) for f in start)) if kind == "kronecker" else start.to(dtype)
        P = sgat.OrthogonalBasis(start)()
        assert torch.equal(dense(P), dense(start))
        assert dense(P).dtype == dtype

    @pytest.mark.parametrize("kind", ["dense", "kronecker"])
    def test_stays_orthogonal_in_fp32_and_moves(self, kind):
        start = sgat.initial_basis(96, kind, generator())
        start = Kronecker(*(f.float() for f in start)) if kind == "kronecker" else start.float()
        basis = sgat.OrthogonalBasis(start)
        optimizer = torch.optim.AdamW(basis.parameters(), lr=1e-2)
        target = sgat.random_orthogonal(96, generator(5)).float()
        for _ in range(100):
            loss = (dense(basis()) - target).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert deviation(basis().detach() if kind == "dense" else Kronecker(*(f.detach() for f in basis()))) <= 1e-5
        assert float((dense(basis()) - dense(start)).detach().norm()) > 1


def states_apart(d=32, segments=16, length=16, C=24, seed=0, noise=0.0):
    """Tokens whose masked and unmasked states have outliers in one hidden direction each."""
    g = generator(seed)
    state = torch.rand(segments, length, generator=g) < 0.5
    x = torch.randn(segments, length, d, generator=g)
    loud = torch.randn(2, d, generator=g)
    size = 6 * torch.randn(segments, length, 1, generator=g)
    x = x + size * torch.where(state[..., None], loud[0], loud[1]) + noise
    weight = torch.randn(C, d, generator=g) / d**0.5
    return x, x @ weight.T, state, weight


def cast(P, dtype=torch.float32):
    return Kronecker(*(f.to(dtype) for f in P)) if isinstance(P, Kronecker) else P.to(dtype)


def held_out_loss(x, y, state, weight, P, rows, d_m, d_u):
    losses = [float(sgat_loss(x[i], y[i], state[i], P, weight, d_m, d_u)) for i in rows]
    return np.mean(losses) / float(y.square().sum(-1).mean())


class TestFit:
    @pytest.mark.parametrize("kind", ["dense", "kronecker"])
    @pytest.mark.parametrize("schedule", ["constant", "cosine"])
    def test_lowers_the_held_out_loss(self, kind, schedule):
        x, y, state, weight = states_apart()
        start = cast(sgat.initial_basis(32, kind, generator()))
        P, record = sgat.fit_sgat(x, y, state, weight, start, 1, 1, lr=1e-2, epochs=6, schedule=schedule,
                                  generator=generator())
        assert record["best"] < 0.8 * record["start"]
        assert record["epochs"] == 6
        assert not record["diverged"]
        assert deviation(P) <= 1e-5
        # the record is about segments 7 and 15, and about the P that is returned
        for basis, name in ((start, "start"), (P, "best")):
            assert held_out_loss(x, y, state, weight, basis, (7, 15), 1, 1) == pytest.approx(record[name], rel=1e-4)

    @pytest.mark.parametrize("kind", ["dense", "kronecker"])
    def test_same_seed_same_bits(self, kind):
        x, y, state, weight = states_apart(segments=8)
        start = cast(sgat.initial_basis(32, kind, generator()))
        runs = [sgat.fit_sgat(x, y, state, weight, start, 1, 1, lr=1e-2, epochs=2, generator=generator(s))
                for s in (3, 3, 4)]
        assert torch.equal(dense(runs[0][0]), dense(runs[1][0]))
        assert runs[0][1] == runs[1][1]
        assert not torch.equal(dense(runs[0][0]), dense(runs[2][0]))

    @pytest.mark.parametrize(("kind", "precision"), [("kronecker", "tf32"), ("dense", "ieee")])
    def test_the_loss_of_a_kronecker_basis_alone_is_in_tf32(self, kind, precision, monkeypatch):
        """P and what stands around the training are not; also after an error."""
        x, y, state, weight = states_apart(segments=4)
        setting, seen, fails = torch.backends.cuda.matmul, {"loss": [], "P": []}, [False]

        def loss(*rest):
            seen["loss"].append(setting.fp32_precision)
            if fails[0]:
                raise RuntimeError("out of memory")
            value = sgat_loss(*rest)
            value.register_hook(lambda _: seen["loss"].append(setting.fp32_precision)) if value.requires_grad else None
            return value

        def basis(A, cayley=sgat.cayley):
            seen["P"].append(setting.fp32_precision)
            return cayley(A)

        monkeypatch.setattr(sgat, "sgat_loss", loss)
        monkeypatch.setattr(sgat, "cayley", basis)
        start, before = cast(sgat.initial_basis(32, kind, generator())), setting.fp32_precision
        sgat.fit_sgat(x, y, state, weight, start, 1, 1, epochs=1)
        assert seen["loss"] == [precision] * 4  # held out, trained on with its gradient, held out
        assert set(seen["P"]) == {"ieee"}
        assert setting.fp32_precision == before
        fails[0] = True
        with pytest.raises(RuntimeError, match="out of memory"):
            sgat.fit_sgat(x, y, state, weight, start, 1, 1, epochs=1)
        assert setting.fp32_precision == before

    def test_trains_also_where_gradients_are_off(self):
        x, y, state, weight = states_apart()
        start = sgat.initial_basis(x.shape[-1], "dense", generator())
        start = start.to(x)
        with torch.no_grad():
            P, _ = sgat.fit_sgat(x, y, state, weight, start, 1, 1, lr=1e-2, epochs=2, generator=generator())
        want, _ = sgat.fit_sgat(x, y, state, weight, start, 1, 1, lr=1e-2, epochs=2, generator=generator())
        assert torch.equal(P, want)
        assert not torch.equal(P, start)

    def test_held_out_segments_are_not_trained_on(self, monkeypatch):
        x, y, state, weight = states_apart()
        start, trained, judged = cast(sgat.initial_basis(32, "dense", generator())), [], []

        def spy(x_rows, y_rows, state_rows, *rest, **options):
            numbers = [next(i for i in range(16) if torch.equal(x[i], row)) for row in x_rows]
            assert torch.equal(y_rows, y[numbers])
            assert torch.equal(state_rows, state[numbers])
            (trained if torch.is_grad_enabled() else judged).append(numbers)
            return sgat_loss(x_rows, y_rows, state_rows, *rest, **options)

        monkeypatch.setattr(sgat, "sgat_loss", spy)
        sgat.fit_sgat(x, y, state, weight, start, 1, 1, epochs=2, generator=generator())
        assert judged == [[7, 15]] * 3
        assert [len(batch) for batch in trained] == [4, 4, 4, 2] * 2
        for epoch in (trained[:4], trained[4:]):
            assert sorted(n for batch in epoch for n in batch) == [i for i in range(16) if i not in (7, 15)]
        assert trained[:4] != trained[4:]

    @pytest.mark.parametrize("lr", [1.0, 1e4])
    def test_diverging_training_returns_its_best_iterate(self, lr):
        x, y, state, weight = states_apart(segments=8)
        start = cast(sgat.initial_basis(32, "dense", generator()))
        # a good start, which absurd steps leave for anywhere: most seeds end worse, any is kept at its best
        start, _ = sgat.fit_sgat(x, y, state, weight, start, 1, 1, lr=1e-2, epochs=5, generator=generator())
        diverged = []
        for seed in range(6):
            losses = []
            P, record = sgat.fit_sgat(x, y, state, weight, start, 1, 1, lr=lr, epochs=3, generator=generator(seed),
                                      progress=losses.append)
            assert record["last"] == losses[-1]
            assert record["diverged"] == (record["last"] > record["start"])
            assert record["best"] == min(record["start"], *losses)
            assert held_out_loss(x, y, state, weight, P, (7,), 1, 1) == pytest.approx(record["best"], rel=1e-4)
            diverged.append(record["diverged"])
        assert any(diverged)

    def test_a_loss_that_is_not_finite_ends_it_and_keeps_the_start(self):
        x, y, state, weight = states_apart(segments=4)
        start = cast(sgat.initial_basis(32, "dense", generator()))
        P, record = sgat.fit_sgat(x, y, state, weight, start, 1, 1, lr=float("inf"), epochs=9, generator=generator())
        assert record["diverged"]
        assert record["epochs"] == 1
        assert torch.equal(P, start)

    def moved(self, **options):
        """How far parameters of constant gradient go in five steps of AdamW, in units of the learning rate."""
        class Two(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.plain, self.clip_x = (torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))

            def forward(self):
                return torch.cat((self.plain, self.clip_x))

        value, record = sgat.minimize(Two(), lambda rows, value: -value.sum(), 1, lr=1e-3, epochs=5, **options)
        assert record["epochs"] == 5
        return value.detach() / 1e-3

    def test_clipping_factors_learn_ten_times_as_fast(self):
        np.testing.assert_allclose(self.moved(), [5, 50], rtol=1e-3)

    def test_the_cosine_schedule_ends_at_zero(self):
        """Σ_t (1 + cos(π t / 5)) / 2 over t = 0 .. 4 is 3 steps of the full rate."""
        np.testing.assert_allclose(self.moved(schedule="cosine"), [3, 30], rtol=1e-3)

    def test_one_segment_is_judged_on_itself(self):
        x, y, state, weight = states_apart(segments=1)
        start = cast(sgat.initial_basis(32, "dense", generator()))
        P, record = sgat.fit_sgat(x, y, state, weight, start, 1, 1, lr=1e-2, epochs=3, generator=generator())
        assert record["best"] < record["start"]
        assert held_out_loss(x, y, state, weight, P, (0,), 1, 1) == pytest.approx(record["best"], rel=1e-4)

    def test_no_epochs_returns_the_start(self):
        x, y, state, weight = states_apart(segments=4)
        start = cast(sgat.initial_basis(32, "dense", generator()))
        P, record = sgat.fit_sgat(x, y, state, weight, start, 1, 1, epochs=0)
        assert torch.equal(P, start)
        assert record["start"] == record["best"] == record["last"]


def subspace_data(d, d_m, d_u, kind, seed=0, n=600):
    """(x, state): masked tokens without energy in a hidden d_u-dimensional subspace, unmasked ones in a d_m one.

    In the Kronecker case the subspaces are those of a hidden Kronecker basis, the only ones such a P can find.
    """
    g = generator(seed)
    hidden = dense(sgat.initial_basis(d, kind, g))
    state = torch.rand(n, generator=g) < 0.5
    coordinates = torch.randn(n, d, generator=g, dtype=torch.float64)
    return (coordinates * state_gate(state, d, d_m, d_u, torch.float64)) @ hidden.T, state


def leaked(x, state, P, d_m, d_u) -> float:
    """Share of the energy that the gates take away."""
    z = apply_basis(x, P)
    return float((z * (1 - state_gate(state, x.shape[1], d_m, d_u, z.dtype))).square().sum() / z.square().sum())


class TestAllocation:
    @pytest.mark.parametrize(("d", "d_m", "d_u"), [(48, 3, 3), (60, 2, 7), (60, 7, 2), (32, 0, 4), (32, 4, 0)])
    def test_dense_finds_the_hidden_subspaces(self, d, d_m, d_u):
        x, state = subspace_data(d, d_m, d_u, "dense")
        P = sgat.allocate_subspaces(x, state, d_m, d_u, "dense", generator(1))
        assert deviation(P) < 1e-10
        assert leaked(x, state, P, d_m, d_u) < 1e-20
        assert leaked(x, state, sgat.initial_basis(d, "dense", generator(1)), d_m, d_u) > 0.01

    def test_least_energy_of_given_moments(self):
        """The last d_u columns span the least masked energy, the d_m before them the least unmasked of the rest."""
        moment_m, moment_u = torch.diag(torch.arange(6.0, 0, -1)).double(), torch.diag(torch.arange(1.0, 7)).double()
        P = sgat.least_energy((moment_m, moment_u), (2, 1), 6, generator())
        assert deviation(P) < 1e-12
        energies = P.square()
        np.testing.assert_allclose(energies[4:, 4:].sum(0), 1)  # masked energy 1 and 2: coordinates 4, 5
        np.testing.assert_allclose(energies[0, 3], 1)  # unmasked energy 1: coordinate 0
        np.testing.assert_allclose(energies[1:4, :3].sum(0), 1)
        assert float(energies[1:4, :3].max()) < 0.999  # the shared block is rotated

    @pytest.mark.parametrize(("d", "d_m", "d_u"), [(64, 8, 8), (64, 8, 16), (64, 16, 8), (96, 12, 12)])
    def test_kronecker_with_whole_rows(self, d, d_m, d_u):
        """The small analogue of 4096 = 64 · 64 with d/32 = 128 = two rows."""
        x, state = subspace_data(d, d_m, d_u, "kronecker")
        P = sgat.allocate_subspaces(x, state, d_m, d_u, "kronecker", generator(1))
        assert deviation(P) < 1e-10
        assert leaked(x, state, P, d_m, d_u) < 1e-20
        assert leaked(x, state, sgat.initial_basis(d, "kronecker", generator(1)), d_m, d_u) > 0.05

    # the last three span two rows, where one P2 cannot serve both rows
    @pytest.mark.parametrize(("d", "d_m", "d_u", "share"), [
        (192, 6, 6, 1e-3), (160, 5, 5, 1e-3), (112, 3, 3, 1e-3), (112, 2, 5, 1e-3), (112, 5, 2, 1e-3),
        (576, 18, 18, 0.3), (192, 12, 20, 0.3), (192, 20, 12, 0.3)])
    def test_kronecker_within_rows_leaks_less_than_a_random_basis(self, d, d_m, d_u, share):
        x, state = subspace_data(d, d_m, d_u, "kronecker", n=1500)
        # the directions of P1 that hold the subspaces are quiet ones
        hidden = sgat.initial_basis(d, "kronecker", generator())
        quiet, n2 = torch.ones(d, dtype=torch.float64), len(hidden.P2)
        quiet[-n2 * -(-(d_m + d_u) // n2) :] = 0.3
        x = (x @ hidden.dense() * quiet) @ hidden.dense().T
        P = sgat.allocate_subspaces(x, state, d_m, d_u, "kronecker", generator(1))
        assert deviation(P) < 1e-10
        random = [leaked(x, state, sgat.initial_basis(d, "kronecker", generator(s)), d_m, d_u) for s in range(5)]
        assert leaked(x, state, P, d_m, d_u) < share * np.mean(random)

    @pytest.mark.parametrize("d", [192, 576, 160, 112, 64, 256])
    @pytest.mark.parametrize("kind", ["dense", "kronecker"])
    def test_orthogonal_for_any_size_and_split(self, d, kind):
        x = torch.randn(50, d, generator=generator())
        for d_m, d_u in ((d // 32, d // 32), (0, 0), (1, d // 16), (d // 16, 1), (d // 3, d // 3)):
            P = sgat.allocate_subspaces(x, torch.arange(50) % 2 == 0, d_m, d_u, kind, generator())
            assert dense(P).shape == (d, d)
            assert deviation(P) < 1e-9

    @pytest.mark.parametrize("kind", ["dense", "kronecker"])
    @pytest.mark.parametrize("masked", [True, False])
    def test_tokens_of_one_state_only(self, kind, masked):
        x = torch.randn(40, 64, generator=generator())
        P = sgat.allocate_subspaces(x, torch.full((40,), masked), 2, 2, kind, generator())
        assert deviation(P) < 1e-9
        assert bool(torch.isfinite(dense(P)).all())
