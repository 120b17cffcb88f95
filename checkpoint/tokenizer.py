"""Tokenizers and chat templates, without transformers or jinja.

The tokenizers library reads a `tokenizer.json` as it is. Dream publishes `vocab.json` and `merges.txt` instead, from
which the same byte-level BPE is built. The two chat templates are short functions; they give the same text as the
template strings in the models' tokenizer_config.json.
"""

from pathlib import Path

from checkpoint.folder import added_tokens
from runtime.processes import Refused
from runtime.sampling import END_OF_TURN

# Qwen2's splitting before BPE: contractions, words with one leading symbol, single digits, punctuation, ends of line
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")


def load_tokenizer(folder: Path):
    """The tokenizer of a model folder, a `tokenizers.Tokenizer`, or None if the folder has none.

    Raises Refused with one sentence if its files are broken or disagree about ids.
    """
    source = next((folder / n for n in ("tokenizer.json", "vocab.json") if (folder / n).is_file()), None)
    if source is None:
        return None
    from tokenizers import AddedToken, Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(source)) if source.name == "tokenizer.json" else _qwen2_bpe(folder)
    except BaseException as error:  # the library raises a bare Exception, or panics
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Refused(f"{source} is not a tokenizer ({error}).") from None
    tokenizer.no_truncation()  # a saved training length must not cut prompts
    tokenizer.no_padding()
    for index, token in sorted(added_tokens(folder).items()):
        flags = {k: bool(token.get(k)) for k in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        tokenizer.add_tokens([AddedToken(token["content"], **flags)])  # a token without an id gets the next free one
        if tokenizer.token_to_id(token["content"]) != index:
            raise Refused(f"{folder}: token {token['content']!r} should have id {index}, but the vocabulary "
                          f"gives it {tokenizer.token_to_id(token['content'])}.")
    return tokenizer


def _qwen2_bpe(folder: Path):
    """Byte-level BPE from `vocab.json` and `merges.txt`. Text is normalized (NFC), split, turned into bytes, merged."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _llada_chat(messages) -> str:
    turns = (f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content'].strip()}<|eot_id|>" for m in messages)
    return f"<|startoftext|>{''.join(turns)}<|start_header_id|>assistant<|end_header_id|>\n\n"


def _dream_chat(messages) -> str:  # ChatML
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return f"{''.join(turns)}<|im_start|>assistant\n"


_CHAT = {"llada": _llada_chat, "dream": _dream_chat}


def chat_prompt(family: str, messages: list[dict]) -> str:
    """A conversation [{"role": "system" | "user" | "assistant", "content": text}, ...] as the prompt for its next turn.

    The text holds the special tokens; `tokenizer.encode(text, add_special_tokens=False)` turns them into their ids.
    Raises Refused for an empty conversation, an unknown role, or a family whose template is not known here.
    """
    if family not in _CHAT:
        raise Refused(f"no chat template is known for family {family!r}; format the prompt yourself.")
    if not messages:
        raise Refused("a conversation needs at least one message.")
    for m in messages:
        if m.get("role") not in ("system", "user", "assistant") or not isinstance(m.get("content"), str):
            raise Refused(f"message {m!r} needs a role (system, user or assistant) and a text as content.")
    return _CHAT[family](messages)


def has_template(tokenizer, family: str) -> bool:
    """Whether the chat template of a family is known here, and its tokens to the tokenizer."""
    return family in _CHAT and tokenizer.token_to_id(END_OF_TURN[family]) is not None


def question(tokenizer, family: str, text: str) -> str:
    """A text as the question of a user, in the chat template; Refused if there is none."""
    if not has_template(tokenizer, family):
        raise Refused(f"the tokenizer has no token {END_OF_TURN[family]} or the family no chat template; ask without "
                      f"chat.")
    return chat_prompt(family, [{"role": "user", "content": text}])
