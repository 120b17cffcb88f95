"""Can the tests fail? Small wrong changes to the code, each of which the named tests must notice.

    python tests/mutate.py [--only N] [--jobs J]      a line per mutation, then a Markdown summary on standard output

Every mutation is (file, old text, new text, test files). It is applied to a temporary copy of the repository, where the
named test files run until their first failure: killed is a failing run, survived a passing one. `old` must occur
exactly once in its file, so that a stale mutation is an error and not a survivor. Not collected by pytest.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
EQ, EQ_SGAT, EQ_TAC = "test_equations.py", "test_equations_sgat.py", "test_equations_tac.py"
QUANT = "test_quantizer.py"
KERN, BACK, LAYERS, SGAT = "test_kernels.py", "test_backend.py", "test_layers.py", "test_sgat.py"
MODEL, FAM, CAL, SAMPLE, BENCH = ("test_model.py", "test_families.py", "test_calibrate.py", "test_sampling.py",
                                 "test_bench.py")
BAL, EVAL, TABLES, PRE = "test_balance.py", "test_evaluate.py", "test_tables.py", "test_preflight.py"
FEED, CUDA, BAD, BASE = "test_feedback.py", "test_cuda_kernels.py", "test_bad_input.py", "test_baselines.py"
FIRST = "test_weights_first.py"

MUTATIONS = [
    # ---- starquant.py: quantizers
    ("starquant.py", "return x @ weight.mT", "return x @ weight", EQ),
    ("starquant.py", "return x + (torch.round(x) - x).detach()", "return x + (torch.floor(x) - x).detach()", EQ, QUANT),
    ("starquant.py", "return x + (torch.round(x) - x).detach()", "return torch.round(x)", QUANT),
    ("starquant.py", "ste_round(x / scale) + zero_point, 0, 2**bits - 1)",
     "ste_round(x / scale) + zero_point, 0, 2**bits)", EQ, QUANT),
    ("starquant.py", "ste_round(x / scale) + zero_point, 0, 2**bits - 1)",
     "ste_round(x / scale) + zero_point, 1, 2**bits - 1)", EQ, QUANT),
    ("starquant.py", "ste_round(x / scale) + zero_point", "ste_round(x / scale + zero_point)", EQ, QUANT),
    ("starquant.py", "return scale * (codes - zero_point)", "return scale * (codes + zero_point)", EQ, QUANT),
    ("starquant.py", "(2 ** (bits - 1) - 1)).clamp_min(tiny)", "(2 ** (bits - 1))).clamp_min(tiny)", EQ, QUANT),
    ("starquant.py", "torch.full_like(scale, 2 ** (bits - 1))",
     "torch.full_like(scale, 2 ** (bits - 1) - 1)", EQ, QUANT),
    ("starquant.py", "scale = (x.abs().amax(-1, keepdim=True)", "scale = (x.amax(-1, keepdim=True)", EQ, QUANT),
    ("starquant.py", "scale = (high / steps - low / steps).clamp_min(tiny)",
     "scale = ((high - low) / steps).clamp_min(tiny)", QUANT),
    ("starquant.py", "scale = (high / steps - low / steps).clamp_min(tiny)",
     "scale = high / steps - low / steps", EQ, QUANT),
    ("starquant.py", "steps = x.new_full((), 2**bits - 1)", "steps = x.new_full((), 2**bits)", EQ, QUANT),
    ("starquant.py", "return scale, ste_round(-low / scale)", "return scale, ste_round(low / scale)", EQ, QUANT),
    ("starquant.py", "return scale, ste_round(-low / scale)", "return scale, torch.floor(-low / scale)", EQ, QUANT),
    ("starquant.py", "torch.maximum(x, low * clip[..., :1]), high * clip[..., 1:])",
     "torch.maximum(x, low * clip[..., 1:]), high * clip[..., :1])", EQ, "test_baselines.py", "test_balance.py"),
    ("starquant.py", "return y.clamp(-largest, largest).to(x.dtype)", "return y.to(x.dtype)", QUANT),
    ("starquant.py", "rounded = (x / scale).round_().add_(zero_point)",
     "rounded = (x / scale).floor_().add_(zero_point)", QUANT, SGAT),
    ("starquant.py", "out = grad * inside", "out = grad", QUANT),
    ("starquant.py", "d_scale = d_scale * (scale > torch.finfo(torch.float32).tiny)", "d_scale = d_scale + 0",
     QUANT, "test_numerics.py"),
    ("starquant.py", "share = x.sign() * d_scale / (2 ** (ctx.bits - 1) - 1)",
     "share = d_scale / (2 ** (ctx.bits - 1) - 1)", QUANT),
    ("starquant.py", "d_zero = out.sum(-1, keepdim=True) - grad.sum(-1, keepdim=True)",
     "d_zero = grad.sum(-1, keepdim=True) - out.sum(-1, keepdim=True)", QUANT),
    ("starquant.py", "d_scale = d_scale + d_zero * (low / scale)", "d_scale = d_scale", QUANT),
    ("starquant.py", "out = _add_at(out, x == low, -share - d_zero)",
     "out = _add_at(out, x == low, share - d_zero)", QUANT),
    ("starquant.py", "amount / where.sum(-1, keepdim=True).clamp_min(1)", "amount", QUANT),
    ("starquant.py", "y = x if x.dtype == torch.float64 else x.float()", "y = x", QUANT, EQ),
    ("starquant.py", "linear(fake_quantize(x, abits), fake_quantize(weight, wbits, symmetric=True))",
     "linear(fake_quantize(x, abits), fake_quantize(weight, wbits))", EQ),
    # ---- starquant.py: transforms, gates
    ("starquant.py", "return (P.P1.mT @ (x @ P.P2)).flatten(-2)", "return (P.P1 @ (x @ P.P2)).flatten(-2)", EQ),
    ("starquant.py", "return (P.P1.mT @ (x @ P.P2)).flatten(-2)", "return (P.P1.mT @ (x @ P.P2.mT)).flatten(-2)", EQ),
    ("starquant.py", '"... n b, n b c -> ... n c"', '"... n b, n c b -> ... n c"', EQ),
    ("starquant.py", "torch.linalg.inv(P.double()).mT.to(P.dtype)", "torch.linalg.inv(P.double()).to(P.dtype)", EQ),
    ("starquant.py", "(1e-9 if P.dtype == torch.float64 else 1e-5)",
     "(1e-1 if P.dtype == torch.float64 else 1e-1)", EQ),
    ("starquant.py", "return x[state], x[~state]", "return x[~state], x[state]", EQ_SGAT),
    ("starquant.py", "out[state], out[~state] = x_m, x_u", "out[state], out[~state] = x_u, x_m", EQ_SGAT),
    ("starquant.py", "d_sh = P.shape[-1] - d_m - d_u", "d_sh = P.shape[-1] - d_m - d_u - 1", EQ_SGAT),
    ("starquant.py", "gate_m[d - d_u :] = 0", "gate_m[d - d_m :] = 0", EQ_SGAT),
    ("starquant.py", "gate_u[d - d_u - d_m : d - d_u] = 0", "gate_u[d - d_u : d] = 0", EQ_SGAT),
    ("starquant.py", "d_m + d_u > d:", "d_m + d_u >= d:", EQ_SGAT),
    ("starquant.py", "torch.where(state[..., None], gate_m, gate_u)",
     "torch.where(state[..., None], gate_u, gate_m)", EQ_SGAT),
    ("starquant.py", "return apply_basis(x, P) * gate", "return apply_basis(x, P)", EQ_SGAT),
    ("starquant.py", "P if is_orthogonal(P) else inverse_transpose(P))", "P)", EQ_SGAT),
    ("starquant.py", "(y - y_hat).square().sum(-1).mean()", "(y - y_hat).square().mean()", EQ_SGAT),
    ("starquant.py", "(y - y_hat).square().sum(-1).mean()", "(y - y_hat).abs().sum(-1).mean()", EQ_SGAT),
    ("starquant.py", "linear(transform(x, P, 1 - gate), fold_weight(weight, P))",
     "linear(transform(x, P, gate), fold_weight(weight, P))", EQ_SGAT),
    # ---- starquant.py: TAC
    ("starquant.py", "q.shape[-1] ** 0.5, -1) @ v", "q.shape[-1], -1) @ v", EQ_TAC),
    ("starquant.py", '(einsum(blocks, M, "... b g, b h g -> ... b h") + bias)',
     '(einsum(blocks, M, "... b g, b g h -> ... b h") + bias)', EQ_TAC),
    ("starquant.py", '(einsum(blocks, M, "... b g, b h g -> ... b h") + bias)',
     '(einsum(blocks, M, "... b g, b h g -> ... b h") - bias)', EQ_TAC),
    ("starquant.py", "matrix_power(cov_fp, 0.5) @ matrix_power(damp(cov_q, damping), -0.5)",
     "matrix_power(damp(cov_q, damping), -0.5) @ matrix_power(cov_fp, 0.5)", EQ_TAC),
    ("starquant.py", "matrix_power(damp(cov_q, damping), -0.5)", "matrix_power(cov_q, -0.5)", EQ_TAC),
    ("starquant.py", "matrix_power(cov_fp, 0.5) @ matrix_power(damp(cov_q, damping), -0.5)",
     "matrix_power(cov_fp, 1.0) @ matrix_power(damp(cov_q, damping), -1.0)", EQ_TAC),
    ("starquant.py", "    M = shrink_to_identity(smooth_singular_values(M, smoothing), shrinkage)",
     "    M = shrink_to_identity(smooth_singular_values(M, shrinkage), smoothing)", EQ_TAC),
    ("starquant.py", "centred.mT @ centred / blocks.shape[1]", "centred.mT @ centred / (blocks.shape[1] - 1)", EQ_TAC),
    ("starquant.py", "centred = blocks - mu[:, None]", "centred = blocks", EQ_TAC),
    ("starquant.py", "rho * (cov.diagonal(dim1=-2, dim2=-1).sum(-1) / g).clamp_min(eps)",
     "rho * cov.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(eps)", EQ_TAC),
    ("starquant.py", "(1 - eta) * sigma + eta * sigma.mean(-1, keepdim=True)",
     "eta * sigma + (1 - eta) * sigma.mean(-1, keepdim=True)", EQ_TAC),
    ("starquant.py", "sigma.mean(-1, keepdim=True)", "sigma.mean()", EQ_TAC),
    ("starquant.py", "(1 - alpha) * M + alpha * torch.eye", "alpha * M + (1 - alpha) * torch.eye", EQ_TAC),
    ("starquant.py", "eigenvalues.clamp_min(1e-12).pow(p)", "eigenvalues.pow(p)", EQ_TAC),
    ("starquant.py", "torch.linalg.solve(damp(cov_q, damping), cross.mT).mT",
     "torch.linalg.solve(damp(cov_q, damping), cross.mT)", EQ_TAC),
    ("starquant.py", "cross = centred_fp.mT @ centred_q / len(z_fp)",
     "cross = centred_q.mT @ centred_fp / len(z_fp)", EQ_TAC),
    # ---- layers.py: what runs
    ("layers.py", "return x * state_gate(state, self.in_features, self.d_m, self.d_u)",
     "return x * state_gate(state, self.in_features, self.d_u, self.d_m)", LAYERS, CAL),
    ("layers.py", "return x * state_gate(state, self.in_features, self.d_m, self.d_u)",
     "return x * state_gate(~state, self.in_features, self.d_m, self.d_u)", LAYERS, CAL),
    ("layers.py", "return self.weight_scale[:, None] * (self.codes() - zero).float()",
     "return self.weight_scale[:, None] * (self.codes() + zero).float()", LAYERS),
    ("layers.py", "return (self.weight_scale[ids][..., None] * rows).to(self.dtype)",
     "return rows.to(self.dtype)", BENCH),
    ("layers.py", "self.clip, self.feedback, self.shift, flat,\n                                   x.dtype)",
     "self.clip, self.feedback, self.shift, flat)", LAYERS),
    ("layers.py", "self.clip, self.feedback, self.shift, flat,", "self.clip, self.feedback, None, flat,", BAL),
    ("layers.py", "codes.shape[1] != (self.in_features + 1) // 2", "False", LAYERS),
    ("layers.py", "kernels.row_sums(codes, self.in_features)", "kernels.row_sums(codes, 2 * codes.shape[1])", LAYERS),
    ("layers.py", "(x - self.mean[state.long()])", "(x - self.mean[1 - state.long()])", BAL),
    ("layers.py", "y + self.shift[state.long()]", "y + self.shift[0]", BAL),
    ("layers.py", '(tensors.get("mean"), tensors.get("shift"))', "(None, None)", CAL),
    # ---- balance.py
    ("balance.py", "S.pow(-a)[..., None] * R", "S.pow(a)[..., None] * R", BAL),
    ("balance.py", "x, w = S.pow(2 - 2 * a), S.pow(2 * a)", "x, w = S.pow(2 * a), S.pow(2 - 2 * a)", BAL),
    ("balance.py", "4.0**-wbits * conditional", "4.0**-abits * conditional", BAL),
    ("balance.py", "conditional_variance(w.mean(0)) if feedback else w.mean()", "w.mean()", BAL),
    ("balance.py", "T.mT @ spread(size, generator)", "T @ spread(size, generator)", BAL),
    ("balance.py", "inner = inner[..., order]", "inner = inner[..., order.flip(0)]", BAL),
    ("balance.py", "config.wbits, config.abits, feedback))", "config.wbits, config.abits, True))", BAL),
    ("balance.py", "torch.linalg.svd((L_w.mT @ L_x)", "torch.linalg.svd((L_x.mT @ L_w)", BAL),
    ("balance.py", "for rows in (~masked, masked)", "for rows in (masked, ~masked)", BAL),
    ("balance.py", "rows.sum().clamp_min(1)", "rows.sum()", BAL),
    ("balance.py", "x.new_full((2,), c), feedback) - x",
     "x.new_full((2,), c), feedback) - fake_quantize_rows(x, 8, x.new_full((2,), c))", BAL),
    ("balance.py", "token_weights.double().sqrt()[:, None]", "token_weights.double()[:, None]", BAL),
    ("balance.py", "means @ weight.mT", "means.flip(0) @ weight.mT", BAL),
    ("balance.py", "2 * both > own, own / both, 1.0)", "2 * both > own, both / own, 1.0)", BAL),
    ("balance.py", "2 * both > own, own / both, 1.0)", "own > 0, own / both, 1.0)", BAL),
    ("balance.py", "fake_quantize_rows(few, config.abits, clip, V)", "few", BAL),
    ("balance.py", "= scale * gain, float", "= scale, float", BAL),
    ("balance.py", "P = in_dtype(in_dtype(P, torch.bfloat16), weight)", "P = in_dtype(P, weight)", BAL),
    ("layers.py", "tensor.detach() if tensor.dtype == torch.bfloat16 else tensor.detach().float()",
     "tensor.detach().float()", BAL),
    ("memory.py", "2 * (widths + rows)", "widths + rows", BENCH),
    ("balance.py", "return x[::step], x.new_ones(len(x[::step])) if token_weights is None else token_weights[::step]",
     "return x[::step], x.new_ones(len(x[::step])) if token_weights is None else token_weights[:len(x[::step])]", BAL),
    ("tables.py", '{"segments": self.segments}', "{}", TABLES),
    # ---- checkpoint.py
    ("checkpoint.py", "not torch.isfinite(torch.stack(tensor.aminmax())).all()", "False", BAD),
    ("checkpoint.py", "torch.stack(tensor.aminmax())", "tensor.max()", BAD),
    # ---- gptq.py
    ("gptq.py", "columns[i + 1 :].addr_(near[i, i + 1 :], errors[i], alpha=-1)", "", BASE),
    ("gptq.py", ".flip(-2, -1)).flip(-2, -1)", ".flip(-2, -1))", BASE),
    ("gptq.py", "errors.mT, U[start:end, end:], alpha=-1)", "errors.mT, U[start:end, end:])", BASE),
    ("gptq.py", "max(1, at_a_time // weight.shape[1])", "len(weight)", BASE),
    # ---- feedback.py
    ("feedback.py", "block_moments(weight, size), damping)", "block_moments(weight, size), 1)", FEED),
    ("feedback.py", "(U / U.diagonal(dim1=-2, dim2=-1)[..., None])", "(U / U.diagonal(dim1=-2, dim2=-1)[..., None, :])",
     FEED),
    ("feedback.py", ".triu(1)", ".triu(0)", FEED),
    ("feedback.py", "torch.where(left, M.diagonal(), torch.inf).argmin()",
     "torch.where(left, M.diagonal(), -torch.inf).argmax()", FEED),
    ("feedback.py", "M = M - torch.outer(M[:, i], M[i]) / M[i, i]", "M = M - torch.outer(M[:, i], M[i])", FEED),
    ("feedback.py", "order[::-1]", "order", FEED),
    ("kernels.py", "-(2 ** (bits - 1)) - zero", "-(2 ** (bits - 1))", FEED),
    ("kernels.py", "(u[i] - r).to(torch.bfloat16).float()", "u[i] - r", FEED),
    ("kernels.py", "addcmul_(e, V[i, i + 1 :], value=-1)", "addcmul_(e, V[i, i + 1 :], value=1)", FEED),
    ("kernels.py", "return feedback_codes(x, scale", "return feedback_codes(x.clamp(low, high), scale", FEED),
    ("kernels.py", "torch.minimum(high, high * clip[1])", "torch.minimum(high, high * clip[0])", BASE, KERN),
    ("kernels.py", "x = x if clip is None else torch.minimum(torch.maximum(x, low), high)", "", BASE, KERN, CUDA),
    ("kernels.cu", "k % FEEDBACK_BLOCK > k / FEEDBACK_BLOCK", "k % FEEDBACK_BLOCK >= k / FEEDBACK_BLOCK", CUDA),
    ("kernels.cu", "j = (i + 1) / 4;", "j = (i + 4) / 4;", CUDA),
    ("kernels.cu", "shift + (state[m] ? N : 0) + n, sh", "shift + (state[m] ? 0 : N) + n, sh", CUDA),
    ("kernels.cu", "high = fminf(high, __fmul_rn(high, clip[1]));", "", CUDA),
    ("kernels.cu", "v[j] = fminf(fmaxf(v[j], low), high);", "", CUDA),
    ("kernels.cu", "float s = most(", "float s = fmaxf(", CUDA),
    ("kernels.cu", "8 * ((j + g) % 4) + 2 * t + r % 2", "8 * ((j + g) % 4) + 2 * t + r / 2", CUDA),
    ("kernels.cu", "8 * ((j + g) % 4)", "8 * j", CUDA),
    ("kernels.cu", "for (int v = 0; v < WARPS; v++)", "for (int v = 0; v < 1; v++)", CUDA),
    ("kernels.cu", "packed[j][s] << 4 & 0xf0f0f0f0u", "packed[j][s] & 0x0f0f0f0fu", CUDA),
    ("cuda_kernels.py", "_FASTEST[key] = seconds.index(min(seconds))", "_FASTEST[key] = 0", BACK),
    ("cuda_kernels.py", "    if len(ways) == 1:\n        return ways[0]\n", "", BACK),
    ("cuda_kernels.py", "rows <= FEW", "rows < FEW", BACK),
    ("cuda_kernels.py", "K % 128 == 0 and N % 32 == 0", "K % 64 == 0 and N % 32 == 0", BACK),
    ("kernels.cu", "v[i] = r + z;", "v[i] = r - z;", CUDA),
    ("kernels.cu", "+ blockIdx.y * FEEDBACK_BLOCK;", "+ blockIdx.y;", CUDA),
    ("cuda_kernels.py", "(_blocks(M), K // FEEDBACK_BLOCK)", "(M // THREADS, K // FEEDBACK_BLOCK)", CUDA),
    # ---- metrics.py, tables.py
    ("metrics.py", "(want.exp() * (want - got)).sum(-1)", "(got.exp() * (got - want)).sum(-1)", EVAL),
    ("metrics.py", "placed.sum(-1) / t[rows] / region[rows].sum(-1)", "placed.sum(-1) / region[rows].sum(-1)", EVAL),
    ("metrics.py", "torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2]",
     "torch.quantile(means, torch.tensor([1 - level, level]", EVAL),
    ("tables.py", 'float(1 - values["kl"].mean() / rtn.mean())', 'float(values["kl"].mean() / rtn.mean())', TABLES),
    ("tables.py", "{k: values[k] - measured[other][k] for", "{k: measured[other][k] - values[k] for", TABLES),
    ("tables.py", "torch.cat([values[k] - base[k] for k in TASKS], -1)",
     "torch.cat([base[k] - values[k] for k in TASKS], -1)", TABLES),
    ("tables.py", "interval[1] * interval[2] > 0 and bool", "bool", TABLES),
    ("tables.py", " and bool((by_seed > 0).all() or (by_seed < 0).all())", "", TABLES),
    ("tables.py", 'v if k == "kl" else v.flatten()', "v.flatten()", TABLES),
    ("metrics.py", "torch.randint(n, (draws, S, n), generator=g)", "torch.arange(n).expand(draws, S, n)", EVAL),
    # ---- which setting is whose, what baselines do
    ("methods.py", "if self.method not in SETTINGS_OF.get(name, METHODS):", "if name not in SETTINGS_OF:", BAD),
    ("methods.py", '"state_fraction": ("freeact", "starquant")', '"state_fraction": ("starquant",)', BASE),
    ("methods.py", '("gptq", "quarot", *baselines.DLLMQUANT, *_OURS)', '("gptq", "quarot", *_OURS)', PRE),
    ("baselines.py", "0.9 if bits <= 4 else None", "0.9", BASE),
    ("flat.py", "P = [p if isinstance(p, Kronecker) else 1 / p for p in P] if orthogonal", "P = P if orthogonal", BASE),
    # ---- preflight.py, output.py
    ("preflight.py", "gptq * (16 * d * d + 9 * rows * d)", "gptq * (8 * d * d + 9 * rows * d)", PRE),
    ("preflight.py", "int((here / used).read_text()) + int(kept)", "int((here / used).read_text()) - int(kept)", PRE),
    ("preflight.py", "tokens * (3 * c.d_model + sum(widths) + max(widths))",
     "tokens * (2 * c.d_model + sum(widths))", CAL),
    ("preflight.py", "2 * (d + rows) * (config.method", "2 * d * (config.method", PRE),
    ("output.py", 'path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")', "path.stat().st_size", PRE),
    # ---- kernels.py
    ("kernels.py", "(codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)",
     "(codes[..., 1::2] & 15) | (codes[..., 0::2] << 4)", KERN),
    ("kernels.py", "(p << 4 >> 4).to(torch.int16) & 255", "(p & 15).to(torch.int16)", KERN),
    ("kernels.py", "return both.view(torch.int8)[..., :k]", "return both.view(torch.int8)", KERN),
    ("kernels.py", "codes.min() < -8 or codes.max() > 7", "codes.min() < -8 or codes.max() > 8", KERN),
    ("kernels.py", "a.shape[1] * largest < 2**24", "a.shape[1] * largest < 2**34", KERN),
    ("kernels.py", "part.sum(-1, dtype=torch.int32)", "part.sum(-1, dtype=torch.int8)", KERN),
    ("kernels.py", "torch.zeros(_multiple(max(M, 32), 32)", "torch.zeros(_multiple(max(M, 17), 1)", KERN),
    ("kernels.py", "if (a.device, M, K, N) not in _REFUSED:", "if not _REFUSED:", BACK),
    ("kernels.py", "raise  # out of memory", "pass  # out of memory", BACK),
    ("kernels.py", "return torch._int_mm(operand, w.t())[:M, :N]", "return torch._int_mm(operand, w.t())[:M]", KERN),
    ("kernels.py", "(x / scale).round_().add_(zero)", "(x / scale).floor_().add_(zero)", KERN),
    ("kernels.py", "zero = torch.round(-low / scale) - half", "zero = torch.round(-high / scale) - half", KERN),
    ("kernels.py", ".clamp_(-half, levels - half)", "", KERN),
    ("kernels.py", "acc.addcmul_(zero, weight_sum[part], value=-1)", "acc.addcmul_(zero, weight_sum[part])", KERN),
    ("kernels.py", "x_sum = codes.sum(-1, keepdim=True, dtype=torch.int32) - K * zero",
     "x_sum = codes.sum(-1, keepdim=True, dtype=torch.int32)", KERN),
    ("kernels.py", "acc.addcmul_(x_sum, weight_zero[part], value=-1)", "acc.addcmul_(x_sum, weight_zero[:1], value=-1)",
     KERN),
    ("kernels.py", "out += bias[part]", "out += bias[:1]", KERN),
    ("kernels.py", "torch.where(state[:, None], shift[1, part], shift[0, part])",
     "torch.where(state[:, None], shift[0, part], shift[1, part])", FIRST),
    ("kernels.py", "acc >>= 4", "acc >>= 3", FIRST),
    ("kernels.py", "len(tensors[0]) <= rows", "len(tensors[0]) <= 2 * rows", KERN),
    ("layers.py", "x.reshape(-1, self.in_features), *states)", "x.reshape(-1, self.in_features))", LAYERS),
    ("kernels.py", "torch.cat((codes[:, 0::2], codes[:, 1::2]), -1)", "codes", FIRST),
    ("kernels.py", "torch.bitwise_and(packed, 240, out=odd)", "torch.bitwise_right_shift(packed, 4, out=odd)", FIRST),
    ("kernels.py", 'return device.type == "cpu" and M <= 256', "return M <= 256", FIRST),
    ("kernels.py", "return torch._int_mm(w, operand).t()[:M, :N]", "return torch._int_mm(w, operand).t()[:M]", FIRST),
    ("kernels.py", "operand = padded(codes) if use == \"int_mm\" else None", "operand = None", FIRST),
    ("kernels.py", 'if not _self_check("cpu"):', "if False:", BACK),
    ("kernels.py", "for M, K, N in ((33, 24, 40), (64, 512, 512), (257, 24, 40)):",
     "for M, K, N in ((33, 24, 40), (257, 24, 40)):", BACK),
    ("kernels.py", "zip(*rounds[1:], strict=True)", "zip(*rounds, strict=True)", BACK),
    ("kernels.py", "for M, K, N in ((33, 24, 40), (64, 512, 512), (257, 24, 40)):",
     "for M, K, N in ((33, 24, 40), (64, 512, 512)):", FIRST),
    # ---- model.py
    ("model.py", "torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)",
     "torch.rsqrt(y.var(-1, keepdim=True) + self.eps)", MODEL, FAM),
    ("model.py", "torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)",
     "torch.rsqrt(y.pow(2).mean(-1, keepdim=True))", MODEL, FAM),
    ("model.py", "return self.weight * y.to(x.dtype)", "return (self.weight * y).to(x.dtype)", MODEL, FAM, SAMPLE),
    ("model.py", "1.0 / config.rope_theta ** (torch", "config.rope_theta ** (torch", MODEL, FAM),
    ("model.py", "torch.cat((-second, first), -1) * sin", "torch.cat((second, -first), -1) * sin", MODEL, FAM),
    ("model.py", "dtype = torch.float32 if config.rope_fp32 else dtype", "dtype = torch.float32", MODEL, FAM, SAMPLE),
    ("model.py", "return rope(q, *table), rope(k, *table), v", "return rope(q, *table), k, v", MODEL, FAM),
    ("model.py", "q, k = self.q_norm(q), self.k_norm(k)", "q, k = self.k_norm(q), self.q_norm(k)", FAM),
    ("model.py", "return x + self.down(F.silu(gate) * up, state)",
     "return x + self.down(F.silu(up) * gate, state)", MODEL, FAM),
    ("model.py", "return x + self.down(F.silu(gate) * up, state)",
     "return self.down(F.silu(gate) * up, state)", MODEL, FAM),
    ("model.py", "gate, up = self.gate_up(self.ffn_norm(x), state)",
     "gate, up = self.gate_up(self.attn_norm(x), state)", MODEL, FAM),
    ("model.py", "z = self.tac(self.attention(", "z = (self.attention(", CAL, "test_baselines.py"),
    ("model.py", "state = ids == self.mask_id  # taken here, once", "state = ids != self.mask_id", MODEL, CAL),
    ("model.py", "positions = (attention_mask.long().cumsum(-1) - 1)",
     "positions = attention_mask.long().cumsum(-1)", SAMPLE, FAM),
    ("model.py", "z = z.masked_fill(~mask.diagonal(dim1=-2, dim2=-1)[..., None], 0)", "pass", MODEL),
    ("model.py", "mask = keep[:, None, None, :]",
     "mask = keep[:, None, :, None]", MODEL, FAM, SAMPLE),
    ("model.py", "torch.cat((hidden[:, :1], hidden[:, :-1]), 1)",
     "torch.cat((hidden[:, 1:], hidden[:, -1:]), 1)", SAMPLE, FAM),
    ("model.py", "else scores * self.config.logit_scale", "else scores", FAM),
    ("model.py", "return self.norm(x)", "return x", MODEL, FAM),
    # ---- sgat.py
    ("sgat.py", "return Q * R.diagonal().sign()", "return Q", SGAT),
    ("sgat.py", "torch.linalg.solve(eye + S, eye - S)", "torch.linalg.solve(eye + S, eye + S)", SGAT),
    ("sgat.py", "S = (A - A.mT) / 2", "S = (A + A.mT) / 2", SGAT),
    ("sgat.py", "return Q[:, :n], Q[:, n:]", "return Q[:, -n:], Q[:, :-n]", SGAT),
    ("sgat.py", "least_energy((moment_m, moment_u), (d_u, d_m)", "least_energy((moment_u, moment_m), (d_u, d_m)", SGAT),
    ("sgat.py", "least_energy((moment_m, moment_u), (d_u, d_m)", "least_energy((moment_m, moment_u), (d_m, d_u)", SGAT),
    ("sgat.py", "columns.insert(0, rest @ least)", "columns.append(rest @ least)", SGAT),
    ("sgat.py", "[1 - gate for gate in subspace_gates", "[gate for gate in subspace_gates", SGAT),
    ("sgat.py", "patterns, counts = loses[:, gated].flip(2)", "patterns, counts = loses[:, gated]", SGAT),
    ("sgat.py", "torch.arange(segments) % 8 == 7", "torch.arange(segments) % 8 == 6", SGAT),
    ("sgat.py", "train = (~held).nonzero()[:, 0]", "train = torch.arange(segments)", SGAT),
    ("sgat.py", "if history[-1] < least:", "if True:", SGAT),
    ("sgat.py", '(10 if name.startswith("clip") else 1)', "1", "test_baselines.py", SGAT),
    ("sgat.py", "scheduler.step()", "pass", SGAT),
    ("sgat.py", "optimizer.zero_grad(set_to_none=True)", "pass", SGAT),
    ("sgat.py", "abits, wbits, bias, symmetric) / norm", "abits, wbits, bias, symmetric)", SGAT),
    ("layers.py", "zeros.append((zero_point[:, 0] - half)", "zeros.append(zero_point[:, 0]", LAYERS),
    ("starquant.py", "folded = fake_quantize(fold_weight(weight, P), wbits, symmetric)",
     "folded = fake_quantize(fold_weight(weight, P), wbits, True)", EQ_SGAT),
    # ---- sampling.py
    ("sampling.py", "logits.exp() / (-noise.log()) ** temperature", "logits.exp() / -noise.log()", MODEL),
    ("sampling.py", "unconditional + (cfg_scale + 1) * (conditional - unconditional)",
     "unconditional + cfg_scale * (conditional - unconditional)", MODEL),
    ("sampling.py", "confidence.topk(count).indices", "confidence.topk(count, largest=False).indices", MODEL),
    ("sampling.py", "yield end, n + (i < remainder)", "yield end, n + (i >= steps_per_block - remainder)", MODEL),
    ("sampling.py", "confidence[:, end:] = -torch.inf", "pass", MODEL),
    ("sampling.py", "confidence = confidence.masked_fill(~masked, -torch.inf)", "pass", MODEL),
    ("sampling.py", "chosen & (ids != model.mask_id))", "chosen)", MODEL, SAMPLE),
    ("sampling.py", "x0 = torch.full_like(ids, mask_id)", "x0 = ids.clone()", SAMPLE),
    ("sampling.py", "- 1).abs() < 1e-6).all())", "- 1).abs() < 1).all())", SAMPLE),
    ("sampling.py", "scatter(-1, chosen, True) & ~done", "scatter(-1, chosen, True)", SAMPLE),
    ("model.py", "1.0 / config.rope_theta ** (", "config.rope_theta ** -(", MODEL),
    ("sampling.py", "[1 - t[i + 1] / t[i] for i in range(steps - 1)] + [1]",
     "[1 - t[i + 1] / t[i] for i in range(steps)]", SAMPLE),
    ("sampling.py", "outside = ordered.softmax(-1).cumsum(-1) > top_p",
     "outside = ordered.softmax(-1).cumsum(-1) < top_p", SAMPLE),
    ("sampling.py", "confidence = best[:, 0] - best[:, 1]", "confidence = best[:, 1] - best[:, 0]", SAMPLE),
    ("sampling.py", "confidence = (probs * (probs + 1e-10).log()).sum(-1)",
     "confidence = -(probs * (probs + 1e-10).log()).sum(-1)", SAMPLE),
    ("sampling.py", "count = int(masked.sum() / len(ids) * share)",
     "count = round(float(masked.sum() / len(ids) * share))", SAMPLE),
]


def check() -> None:
    """Every mutation still applies."""
    for number, (file, old, new, *tests) in enumerate(MUTATIONS):
        found = (ROOT / file).read_text().count(old)
        if found != 1 or old == new or not all((ROOT / "tests" / t).is_file() for t in tests):
            sys.exit(f"mutation {number} is stale: {file} holds {old!r} {found} times.")


def run(number: int, folder: Path) -> tuple[bool, float, str]:
    """(killed, seconds, the failing test) of one mutation in a copy of the repository."""
    file, old, new, *tests = MUTATIONS[number]
    good = (ROOT / file).read_text()
    (folder / file).write_text(good.replace(old, new))
    start = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                               *(f"tests/{t}" for t in tests)], cwd=folder, capture_output=True, text=True, timeout=900)
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        killed, why = done.returncode == 1, lines[0].split(" - ")[0] if lines else done.stdout[-300:]
        if done.returncode not in (0, 1):
            sys.exit(f"mutation {number}: pytest ended with {done.returncode}: {done.stdout[-99:]}{done.stderr[-99:]}")
    except subprocess.TimeoutExpired:
        killed, why = True, "ran for more than 15 minutes"
    (folder / file).write_text(good)
    return killed, time.perf_counter() - start, why if killed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of mutations to run")
    parser.add_argument("--jobs", type=int, default=1, help="copies that run side by side (1)")
    args = parser.parse_args()
    check()
    numbers, survivors = args.only or list(range(len(MUTATIONS))), []
    with tempfile.TemporaryDirectory() as base:
        copies = []
        for job in range(args.jobs):
            copies.append(Path(base) / str(job))
            shutil.copytree(ROOT, copies[-1], ignore=shutil.ignore_patterns(".*", "out", "results", "__pycache__"))

        def one(number):
            folder = copies.pop()
            try:
                return number, *run(number, folder)
            finally:
                copies.append(folder)

        with ThreadPoolExecutor(args.jobs) as pool:
            for number, killed, seconds, why in pool.map(one, numbers):
                file, old, new, *_ = MUTATIONS[number]
                print(f"{number:>3} {'killed' if killed else 'SURVIVED'} {seconds:5.1f} s {file}: {old!r} -> {new!r} "
                      f"{why}", file=sys.stderr, flush=True)
                survivors += [] if killed else [number]
    print(f"{len(numbers) - len(survivors)} of {len(numbers)} mutations killed.\n")
    print("| file | mutations | killed |\n|---|---|---|")
    for file in dict.fromkeys(MUTATIONS[n][0] for n in numbers):
        mine = [n for n in numbers if MUTATIONS[n][0] == file]
        print(f"| {file} | {len(mine)} | {len(set(mine) - set(survivors))} |")
    for n in survivors:
        print(f"\nSurvivor {n}, {MUTATIONS[n][0]}: `{MUTATIONS[n][1]}` -> `{MUTATIONS[n][2]}`")
    return 1 if survivors else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
