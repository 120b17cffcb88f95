"""Likelihoods, trajectories and intervals against hand-made cases and definitions."""

import math

import pytest
import torch
from official import FIXTURES

from checkpoint.folder import Checkpoint
from model import load_block, load_model, load_outer
from runtime import measures, sampling
from runtime.measures import bootstrap, fidelity, judged_copies, likelihoods, predictions
from tiny import metrics


class TestNelbo:
    def test_a_uniform_model_costs_log_vocabulary(self, small_folder):
        model = load_model(small_folder, "cpu")
        model.head.weight.data.zero_()
        ids = torch.randint(1000, (256, 32), generator=torch.Generator().manual_seed(0))
        region = torch.arange(32).expand(256, -1) >= 8
        _, low, high = bootstrap(metrics.losses(model, ids, region, samples=4)["nelbo"])
        assert low < math.log(1024) < high
        assert high - low < 0.5

    def test_same_seed_same_masks(self, small_folder):
        model = load_model(small_folder, "cpu")
        ids, region = torch.randint(1000, (8, 16)), torch.ones(8, 16, dtype=torch.bool)
        first = metrics.losses(model, ids, region, 2, seed=5)["nelbo"]
        assert torch.equal(first, metrics.losses(model, ids, region, 2, seed=5)["nelbo"])
        assert not torch.equal(first, metrics.losses(model, ids, region, 2, seed=6)["nelbo"])


class TestKL:
    def test_equals_its_definition_on_the_same_masks(self, small_folder):
        model, reference = load_model(small_folder, "cpu"), load_model(small_folder, "cpu")
        model.head.weight.data.mul_(0.5)
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, (8, 16), generator=g)
        region = torch.arange(16).expand(8, -1) >= 4
        got = metrics.losses(model, ids, region, 1, seed=3, reference=reference)
        assert torch.equal(got["nelbo"], metrics.losses(model, ids, region, 1, seed=3)["nelbo"])

        g = torch.Generator().manual_seed(3)
        t = sampling.stratified_ratios(8, g, 1e-3)
        noisy = sampling.mask_tokens(ids, region, t, model.mask_id, g)
        for row in range(8):
            with torch.no_grad():
                p, q = (torch.softmax(m(noisy[row : row + 1])[0].double(), -1) for m in (reference, model))
            # KL(p ‖ q) = Σ p log(p / q)
            kl = (p * (p / q).log()).sum(-1)[noisy[row] == model.mask_id].sum() / t[row] / 12
            assert float(got["kl"][row]) == pytest.approx(float(kl), rel=1e-4)

    def test_is_zero_from_itself(self, small_folder):
        model = load_model(small_folder, "cpu")
        ids, region = torch.randint(1000, (8, 16)), torch.ones(8, 16, dtype=torch.bool)
        assert metrics.losses(model, ids, region, 1, reference=model)["kl"].abs().max() == 0


class TestMemory:
    def test_a_model_read_block_by_block_predicts_what_it_predicts_whole(self):
        """Also Dream's, whose hidden states predict the token after them."""
        for family in ("llada", "dream"):
            folder = FIXTURES / family
            model, checkpoint = load_model(folder, "cpu"), Checkpoint(folder)
            ids = torch.randint(200, (5, 12), generator=torch.Generator().manual_seed(0))
            copies = judged_copies(ids, torch.ones_like(ids, dtype=torch.bool), model.mask_id)
            blocks = (load_block(checkpoint, i) for i in range(checkpoint.config.n_layers))
            predicted = predictions(load_outer(checkpoint), blocks, copies.noisy)
            with torch.no_grad():
                want = model(copies.noisy, where=copies.noisy == model.mask_id)
                torch.testing.assert_close(predicted.logits(predicted.hidden), want)

    def test_few_logits_at_once_give_the_same(self, small_folder, monkeypatch):
        model, reference = load_model(small_folder, "cpu"), load_model(small_folder, "cpu")
        model.head.weight.data.mul_(0.5)
        ids = torch.randint(1000, (4, 16), generator=torch.Generator().manual_seed(0))
        copies = judged_copies(ids, torch.ones_like(ids, dtype=torch.bool), model.mask_id)
        both = [predictions(m, m.blocks, copies.noisy) for m in (model, reference)]
        want, rows = likelihoods(copies, *both), []
        monkeypatch.setattr(measures, "SCORES", 3 * 1024 + 5)
        watched = [p._replace(logits=lambda h, p=p: rows.append(len(h)) or p.logits(h)) for p in both]
        got = likelihoods(copies, *watched)
        assert max(rows) == 3
        assert sum(rows) == 2 * len(copies.tokens)
        for name in ("nelbo", "kl"):
            torch.testing.assert_close(got[name], want[name])

    def test_a_segment_without_a_mask_counts_zero(self, small_folder):
        model = load_model(small_folder, "cpu")
        ids = torch.randint(1000, (40, 2), generator=torch.Generator().manual_seed(0))
        copies = judged_copies(ids, torch.ones_like(ids, dtype=torch.bool), model.mask_id, samples=1)
        values = likelihoods(copies, predictions(model, model.blocks, copies.noisy))["nelbo"]
        masked = (copies.noisy == model.mask_id).any(-1)
        assert torch.equal(values > 0, masked)
        assert not masked.all()


class TestTrajectory:
    def test_passes_are_those_of_the_row(self, small_folder):
        model = load_model("tiny", "cpu")
        ids = torch.tensor([model.tokenizer.encode(text).ids[:6] for text in (
            "Ann has 4 boxes of 6 eggs.", "It was a dark night, and the whale")])
        together = measures.trajectory(model, ids, None, 8, 0.9)
        for row in range(2):
            steps = list(sampling.denoise(model, ids[row : row + 1], None, 8, threshold=0.9))
            assert together.passes[row] == len(steps)
            assert torch.equal(together.tokens[row], steps[-1].ids[0, -8:])


class TestFidelity:
    def test_hand_made_trajectories(self):
        tokens, when = torch.tensor([[5, 6, 7, 8]] * 3), torch.tensor([[0, 1, 2, 3]] * 3)
        other_tokens, other_when = tokens.clone(), when.clone()
        other_tokens[1, 2] = 9  # another token at step 2
        other_when[2] = torch.tensor([0, 3, 2, 1])  # two positions in another order
        out = fidelity(measures.Trajectory(tokens, when), measures.Trajectory(other_tokens, other_when))
        assert out["tokens"].tolist() == [1.0, 0.75, 1.0]
        assert out["positions"].tolist() == [1.0, 1.0, 0.5]
        assert out["divergence"].tolist() == [1.0, 0.5, 0.25]


class TestBootstrap:
    def test_interval_of_a_known_distribution(self):
        values = torch.cat((torch.zeros(500), torch.ones(500)))
        mean, low, high = bootstrap(values)
        assert mean == 0.5
        assert abs((high - low) / 2 - 1.96 * 0.5 / 1000**0.5) < 0.004

    def test_constant(self):
        assert bootstrap(torch.full((7,), 2.0)) == (2.0, 2.0, 2.0)

    def test_draws_are_its_own(self):
        """Of seeds and of examples: the same values give the same interval, whatever else has drawn numbers."""
        values = torch.arange(15.0).reshape(3, 5) ** 2
        first = bootstrap(values)
        torch.rand(1)
        assert bootstrap(values) == first

    def test_a_ratio_of_values_that_are_drawn_together(self):
        top, bottom = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([[2.0, 4.0], [6.0, 12.0]])
        assert bootstrap(top, bottom, of=lambda a, b: a / b) == (0.5, 0.5, 0.5)  # in every draw, though both vary
        mean, low, high = bootstrap(top, top.flip(-1), of=lambda a, b: a / b)
        assert mean == 1.0
        assert low < 0.9
        assert high > 1.1
