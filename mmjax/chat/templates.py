"""Chat templates that ship with mmjax: fallbacks for models without one, and templates that the operator may name."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% if loop.last and add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}"
    "{% elif not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
)
BASIC = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

# One message: its parts in order, joined by spaces, with images numbered from 1.
VLM2VEC = (
    "{% if messages | length != 1 %}{{ raise_exception('An embedding is made of exactly one message.') }}{% endif %}"
    "{% set made = namespace(parts=[], images=0) %}"
    "{% for part in messages[0]['content'] %}"
    "{% if part['type'] == 'image' %}"
    "{% set made.images = made.images + 1 %}"
    "{% set made.parts = made.parts + ['<|image_' ~ made.images ~ '|>'] %}"
    "{% else %}{% set made.parts = made.parts + [part['text']] %}{% endif %}"
    "{% endfor %}{{ made.parts | join(' ') }}"
)

TEMPLATES = {"chatml": CHATML, "vlm2vec_phi3v": VLM2VEC}  # by the names of vLLM's template files, without .jinja
# model_type of config.json -> template, for checkpoints without one
FALLBACKS = {
    "minicpmv": CHATML,
    **dict.fromkeys(
        (
            "blip-2",
            "chameleon",
            "clip",
            "colpali",
            "deepseek_ocr",
            "deepseek_ocr2",
            "deepseek_vl_v2",
            "fuyu",
            "paligemma",
            "siglip",
            "siglip2",
        ),
        BASIC,
    ),
}


def fallback(model_type: str | None, name: str) -> str | None:
    """The fallback for a type of model, or None. name: the model's; Qwen's tells whether it was tuned for chat."""
    if model_type == "qwen":
        return CHATML if name.rstrip("/").endswith("-Chat") else BASIC
    return FALLBACKS.get(model_type or "")
