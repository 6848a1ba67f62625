"""Strings that tell tokenizers apart: spaces, digits, scripts, marks, code and noise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

__all__ = ["list_probe_texts", "mix_with_tokens"]

_FIXED: Final = (
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    " \n",
    "\n ",
    "\t",
    "\t\t \t",
    "\r\n",
    "\r",
    " \r\n \r\n",
    "a",
    " a",
    "  a",
    "a ",
    "a  ",
    "a  b   c    d",
    "Hello",
    "Hello world",
    " Hello  world ",
    "Hello, world! How's it going? I'M FINE, they'll say; we've 'd 're 'S 'Ll",
    "don't DON'T Don’t can't've y'all'd",
    "'s't're've'm'll'd",
    "1",
    "12",
    "123",
    "1234",
    "12345678901234567890",
    "3.14159 1,000,000 -42 +7 1e-5 0x1F 12:30 2026-11-24",
    "a1b22c333d4444",
    "½ ² Ⅷ ① ٣٤٥ १२३",
    'def f(x: int) -> str:\n    return f"{x!r}"\n\n\nclass A:\n\tpass\n',
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }  // comment",
    "SELECT * FROM t WHERE x != 'y' AND z >= 10;",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    '<html><body class="x">text</body></html>',
    "https://example.com/path?query=1&other=two#fragment",
    "user.name+tag@example.co.uk",
    "C:\\Windows\\System32\\file.txt",
    "!!!???...,,,;;;:::---___***###@@@$$$%%%^^^&&&",
    "() [] {} <> «» “quotes” ‘single’ „low“ … – — ·",
    "x=y==z===w !== <= >= => -> :: ++ -- && || ** // /* */",
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case",
    "ÀÉÎÕÜ àéîõü ßøåæœ ŁŚĆŻ łśćż ČŠŽ čšž",
    "naïve café résumé São Tomé Ångström",
    "Привет, мир! Как дела? ЁЖИК",
    "Γειά σου Κόσμε ΆΈΉΊ",
    "שלום עולם",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "你好，世界！今天天气怎么样？",
    "こんにちは世界。カタカナ ｶﾀｶﾅ",
    "안녕하세요 세계",
    "Xin chào thế giới",
    "გამარჯობა მსოფლიო Բարեւ աշխարհ",
    "🙂",
    "🙂🙃😀 👍🏽 👩‍👩‍👧‍👦 🇩🇪🇯🇵 ❤️ ✈️",
    "∑∏∫√∞≈≠≤≥±×÷∂∇ αβγδ ℝℕℤ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 𐍈 𠜎",
    "zero\u200bwidth\u200djoiner\u2060 \ufeffbom",
    "\u00a0non-breaking\u00a0space\u2003em\u3000ideographic",
    "soft\u00adhyphen \u2028line\u2029paragraph",
    "\x01\x02\x1b[31mred\x1b[0m\x7f",
    "▁ ▁▁ a▁b",
    "Ġ Ċ ĉ <0x0A> <unk> <s> </s> [PAD1] [INST] <<SYS>>",
    "<|im_start|>user\nhi<|im_end|>",
    "<|endoftext|> <|user|> <|assistant|> <|begin_of_text|>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ababababababababab",
    "the the the the  the   the",
    "                                        indented by forty",
    "\n\n\n\n\n\n\nseven newlines",
    "mixed\n \n  \n   \n    \nstairs",
    "trailing spaces   \nand tabs\t\t\n",
    "Antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "The quick brown fox jumps over the lazy dog.",
    "### Instruction:\nTranslate to French: cheese\n\n### Response:\n",
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.",
    "Q: What is 17 * 23?\nA: 17 * 23 = 391.",
)

_PIECES: Final = (
    *"abzAZ019 .,!?'\"-_/\\()[]{}<>|@#$%^&*+=~`:;\n\t",
    "  ",
    "   ",
    "\n\n",
    "\r\n",
    "the",
    " of",
    "ing",
    "'s",
    "'LL",
    "123",
    "4567",
    "é",
    "ß",
    "ñ",
    "Ж",
    "я",
    "λ",
    "中",
    "文",
    "の",
    "한",
    "ع",
    "ש",
    "ह",
    "🙂",
    "👍🏽",
    "—",
    "…",
    "“",
    "€",
    "²",
    "▁",
    "\u00a0",
    "\u3000",
    "\u200d",
)

_RANDOM_COUNT: Final = 300


def list_probe_texts() -> list[str]:
    """Some hundreds of strings, always the same."""
    generator = random.Random(20261124)
    drawn = [
        "".join(generator.choices(_PIECES, k=generator.randint(1, 24)))
        for _ in range(_RANDOM_COUNT)
    ]
    return [*_FIXED, *drawn]


def mix_with_tokens(tokens: Sequence[str]) -> list[str]:
    """Texts with special tokens at the beginning, in the middle, at the end and doubled."""
    texts = []
    for index, token in enumerate(tokens):
        other = tokens[(index + 1) % len(tokens)]
        texts += [
            token,
            f"{token}Hello",
            f"Hello{token}",
            f"Hello {token} world",
            f"{token}user\nHello there{other}\n{token}assistant\n",
            f"{token}{other}{token}",
            f"x{token}\n\n{other}  y",
        ]
    return texts
