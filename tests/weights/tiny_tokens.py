"""Texts that a tokenizer gets wrong: blanks, digits, scripts, marks, control characters."""

TEXTS = [
    "",
    "a",
    "the inner and the\tthen",
    "  two   spaces    four ",
    "\n\n\r\n x \r\r y\n",
    "1234 12 3.14e-10 ½ ① ٣ 一",
    "he's the's I'LL we'Ve don't",
    "def f(x):\n    return x**2  # the end\n\n\n",
    "你好,世界! 日本語 한국어",
    "café naïve Ünï — ‘quoted’…",
    "🎉👩‍👩‍👧‍👦🇩🇪",
    "مرحبا שלום नमस्ते ไทย",
    "<|im_start|>user\nthe<|im_end|>\n<|endoftext|>",
    "<tool_call>{}</tool_call>x",
    "a<|no_token|>b",
    "\u00a0\u3000\u2028\u200b x",
    "\x00\x01\x7f",
    "[PAD300]",
]
