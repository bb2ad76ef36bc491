"""Templates that come with mmjax: those models fall back to, and those named on the command line."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% if loop.last and add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}"
    "{% elif not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
)
BASIC = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

# One message: its parts in their order, joined by blanks, images numbered from 1.
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

SHIPPED = {"chatml": CHATML, "vlm2vec_phi3v": VLM2VEC}  # by file name without its ending
# model_type of config.json -> template, for checkpoints that bring none
FALLBACK = {
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
    """The template of a kind of model, or None. `name` is the model's own: Qwen says there what it was tuned for."""
    if model_type == "qwen":
        return CHATML if name.rstrip("/").endswith("-Chat") else BASIC
    return FALLBACK.get(model_type or "")
