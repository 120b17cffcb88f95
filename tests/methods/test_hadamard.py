"""Hadamard matrices and the rotations that are made of them."""

import pytest
import torch
from arguments import generator

from methods.hadamard import exists, hadamard, hartley, rotation, rotation_sizes, spread
from starquant import apply_basis


class TestHadamard:
    @pytest.mark.parametrize("n", [1, 2, 4, 12, 16, 20, 24, 28, 36, 44, 56, 64, 96, 128, 148, 192, 576, 704])
    def test_entries_and_orthogonal_rows(self, n):
        H = hadamard(n)
        assert set(H.unique().tolist()) <= {-1, 1}
        assert torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.int64))

    @pytest.mark.parametrize(("d", "sizes"), [(192, (12, 16)), (576, (24, 24)), (704, (16, 44)), (4096, (64, 64)),
                                              (12288, (96, 128)), (3584, (56, 64)), (18944, (128, 148))])
    def test_every_width_that_occurs_is_a_kronecker_product(self, d, sizes):
        assert rotation_sizes(d) == sizes
        P = rotation(d, generator())
        for factor, n in zip(P, sizes, strict=True):
            assert float((factor @ factor.T - torch.eye(n)).abs().max()) < 1e-12
        # an outlier in one channel comes out evenly spread
        one = torch.zeros(d, dtype=torch.float64)
        one[d // 3] = 1
        assert float((apply_basis(one, P).abs() - d**-0.5).abs().max()) < 1e-12

    @pytest.mark.parametrize("n", [1, 3, 5, 6, 9, 14, 37])
    def test_hartley_is_orthogonal_and_nearly_even_for_every_order(self, n):
        H = hartley(n)
        assert float((H @ H.T - torch.eye(n)).abs().max()) < 1e-12
        assert float(H.abs().max()) <= (2 / n) ** 0.5 + 1e-12

    @pytest.mark.parametrize("n", [1, 3, 9, 64])
    def test_spread_takes_hadamard_where_it_is_in_reach(self, n):
        P = spread(n, generator())
        assert float((P @ P.T - torch.eye(n)).abs().max()) < 1e-12
        assert (float((P.abs() - n**-0.5).abs().max()) < 1e-12) == exists(n)
        assert torch.equal(P.abs(), spread(n, generator(1)).abs())  # only the signs are random

    @pytest.mark.parametrize(("d", "sizes"), [(92, (4, 23)), (97, (1, 97)), (11008, (86, 128)), (13696, (107, 128))])
    def test_other_widths_are_rotated_by_factors_of_any_order(self, d, sizes):
        """QuaRot's own code has tables of order 172 for 11008 (Qwen2.5-3B), and nothing for 13696."""
        assert rotation_sizes(d) == sizes
        for factor, n in zip(rotation(d, generator()), sizes, strict=True):
            assert float((factor @ factor.T - torch.eye(n)).abs().max()) < 1e-12
        with pytest.raises(ValueError, match="92"):
            hadamard(92)
