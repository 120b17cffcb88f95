"""What calibration runs on: text is cut into segments, and every token of a segment gets a state, masked or unmasked.

The paper is silent on where token states come from. By default each segment is a masked copy: a share t of its tokens
is replaced by [MASK] (the forward process). With `--states rollout` the model continues the first half of each segment,
one token a step, and the sequence is taken when a share t of the other half is still masked.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint.folder import offline
from methods import dllmquant
from methods.settings import Settings
from runtime import sampling
from runtime.processes import Refused, batches
from tiny import tasks

WINOGRANDE = {"repo_id": "allenai/winogrande", "filename": "winogrande_xl/train-00000-of-00001.parquet",
              "revision": "01e74176c63542e6b0bcb004dcdea22d94fb67b5", "repo_type": "dataset"}


def token_states(model, tokens, region, mask_id: int, config: Settings):
    """Segments (S, L) with [MASK] in place: masked copies, or states from the trajectory of the model `model()`."""
    if config.states == "masked":
        return masked_copies(tokens, region, mask_id, config)
    return rollout(model(), tokens, masking_ratios(len(tokens), config, torch.Generator().manual_seed(config.seed)))


def masked_copies(tokens, region, mask_id: int, config: Settings):
    """Calibration segments (S, L) with a share t of `region` (S, L) masked: the forward process."""
    g = torch.Generator().manual_seed(config.seed)
    region = torch.ones_like(tokens, dtype=torch.bool) if region is None else region
    return sampling.mask_tokens(tokens, region, masking_ratios(len(tokens), config, g), mask_id, g)


def masking_ratios(n: int, config: Settings, generator):
    """t of each segment, (n,): stratified over (0, 1], so that the whole trajectory is there, or DLLMQuant's TMAS."""
    return (dllmquant.tmas_ratios if config.diffusion_aware else sampling.stratified_ratios)(n, generator)


def rollout(model, tokens, ratios, at_once: int = 16):
    """Segments (S, L) and the share t in (0, 1] of each, (S,) -> (S, L): prompt, what the model wrote, and [MASK].

    `at_once` segments run together, for at most L/2 steps.
    """
    length = tokens.shape[1] // 2
    left, out = (ratios * length).ceil().clamp(1, length).to(model.device), []
    for r in batches(len(tokens), at_once):
        prompt = tokens[r, : tokens.shape[1] - length].to(model.device)
        states, taken = F.pad(prompt, (0, length), value=model.mask_id), left[r] == length
        for step in sampling.denoise(model, prompt, length, length):
            now = ((step.ids == model.mask_id).sum(-1) <= left[r]) & ~taken
            states, taken = torch.where(now[:, None], step.ids, states), taken | now
            if taken.all():
                break
        out.append(states.cpu())
    return torch.cat(out)


def find_texts(name: str) -> Path:
    """The file that --data names. "winogrande" is downloaded from the hub, once, unless a file has that name."""
    if name != "winogrande" or Path(name).exists():
        return Path(name)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(**WINOGRANDE, local_files_only=offline()))
    except Exception as error:  # network, proxy, removed repository: many types, one meaning
        raise Refused(f"WinoGrande could not be downloaded ({type(error).__name__}); fetch {WINOGRANDE['filename']} "
                      f"of the data set {WINOGRANDE['repo_id']} elsewhere and give the file: --data FILE.") from None


def read_texts(path: Path) -> list[str]:
    """The documents of a file: a .txt is one document, a .jsonl or .parquet has one a row.

    A row has a "text", or a "sentence" as in WinoGrande, whose gap is filled with the right option.
    """
    texts = []
    for number, row in enumerate(_parquet_rows(path) if path.suffix == ".parquet" else _text_rows(path), 1):
        try:
            row = json.loads(row) if isinstance(row, str) else row
            text = row.get("text", row.get("sentence"))
            if str(row.get("answer")) in ("1", "2") and "option1" in row:
                text = text.replace("_", row[f"option{row['answer']}"])
            texts.append(text + "")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            raise Refused(f'{path}, row {number}: no JSON object with a "text" or "sentence".') from None
    plain = [text.removeprefix("\ufeff").replace("\r\n", "\n").encode("utf-16", "surrogatepass").decode(
        "utf-16", "replace") for text in texts]
    if plain != texts:
        print(f"{path}: byte order marks, CRLF ends of line and halves of surrogate pairs were normalized.",
              file=sys.stderr)
    return plain


def _text_rows(path: Path) -> list:
    try:
        content = path.read_bytes().decode()
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise Refused(f"{path} is not UTF-8 text; convert it first, from Latin-1 by iconv -f latin1 -t utf8.") from None
    if "\0" in content or not content.strip():
        raise Refused(f"{path} holds no text.")
    if path.suffix not in (".txt", ".jsonl"):
        raise Refused(f"{path} is none of .txt, .jsonl and .parquet.")
    if path.suffix == ".txt":
        return [{"text": content}]
    return [line.strip() for line in content.removeprefix("\ufeff").split("\n") if line.strip()]


def _parquet_rows(path: Path) -> list[dict]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise Refused(f"{path} needs pyarrow to be read: python -m pip install pyarrow.") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses
        raise Refused(f"{path} cannot be read as parquet ({type(error).__name__}).") from None
    if not rows:
        raise Refused(f"{path} holds no rows.")
    return rows


def joined_tokens(tokenizer, texts: list[str]):
    """The tokens of all documents, one behind the other, (T,)."""
    return torch.tensor([t for e in tokenizer.encode_batch(texts) for t in e.ids], dtype=torch.long)


def windows(tokens, n: int, length: int, seed: int):
    """The places of n random windows of the joined tokens (T,), (n, length)."""
    starts = torch.randint(len(tokens) - length, (n,), generator=torch.Generator().manual_seed(seed))
    return starts[:, None] + torch.arange(length)


def text_segments(tokenizer, texts: list[str], source: str, n: int, length: int, seed: int):
    """n windows of the joined documents (Section 4.1): tokens (n, length), and a region (n, length) that is True.

    source: what the documents come from, for the refusal if they are too few.
    """
    tokens = joined_tokens(tokenizer, texts)
    if len(tokens) < 2 * length:
        raise Refused(f"{source} gives {len(tokens)} tokens, too few for segments of {length}; give at least "
                      f"{2 * length} or lower --length.")
    ids = tokens[windows(tokens, n, length, seed)]
    return ids, torch.ones_like(ids, dtype=torch.bool)


def held_out_segments(tokenizer, texts: list[str], n: int, length: int, seed: int, calibrated: tuple | None = None):
    """At most n segments of the joined documents that do not overlap, (m, length), m <= n, drawn by seed.

    calibrated: the n and the seed of `text_segments`, whose windows are left out.
    """
    tokens = joined_tokens(tokenizer, texts)
    free = torch.ones(len(tokens), dtype=torch.bool)
    if calibrated:
        free[windows(tokens, calibrated[0], length, calibrated[1])] = False
    cut = tokens[: len(tokens) // length * length].view(-1, length)
    cut = cut[free[: cut.numel()].view(cut.shape).all(-1)]
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))[:n]]


def calibration_texts(data: str | None) -> list[str]:
    """The documents of --data, by default WinoGrande's, as in the paper. The embedded model needs none."""
    return read_texts(find_texts(data or "winogrande"))


def calibration_tokens(args, tokenizer, texts: list[str] | None):
    """Segments and their maskable region, both (S, L): from texts, or from the embedded model's calibration split."""
    if tokenizer is None:
        raise Refused(f"{args.model} has no tokenizer, which calibration text needs.")
    if texts is not None:
        return text_segments(tokenizer, texts, args.data or "winogrande", args.segments, args.length, args.seed)
    return tasks.calibration_set(tokenizer, args.segments, args.length, args.seed)
