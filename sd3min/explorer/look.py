"""The page's colours, in the light and in the dark, on the parts that are gradio's.

The page's own parts are in `style.css`.
"""

from typing import Any

from gradio.themes import Base

PAPER, CARD, INK = ("#faf8f5", "#161412"), ("#ffffff", "#1f1c19"), ("#1f1b16", "#ece6dc")
SOFT, LINE, ACCENT = ("#6a6358", "#a69e92"), ("#e3ddd3", "#38332d"), ("#b93c0b", "#ff8c55")
ON_ACCENT, CLEAR = ("#ffffff", "#1f1109"), ("transparent", "transparent")
COLOURS = {  # in the light and in the dark
    "body_background_fill": PAPER,
    "body_text_color": INK,
    "body_text_color_subdued": SOFT,
    "background_fill_primary": PAPER,
    "background_fill_secondary": CARD,
    "border_color_primary": LINE,
    "border_color_accent": ACCENT,
    "color_accent_soft": CARD,
    "link_text_color": ACCENT,
    "block_background_fill": CLEAR,
    "block_label_text_color": SOFT,
    "block_label_background_fill": CLEAR,
    "block_title_text_color": SOFT,
    "input_background_fill": CARD,
    "input_background_fill_focus": CARD,
    "input_border_color": LINE,
    "input_border_color_focus": ACCENT,
    "input_placeholder_color": SOFT,
    "button_primary_background_fill": ACCENT,
    "button_primary_background_fill_hover": ACCENT,
    "button_primary_text_color": ON_ACCENT,
    "button_primary_border_color": ACCENT,
    "button_secondary_background_fill": CARD,
    "button_secondary_background_fill_hover": CARD,
    "button_secondary_text_color": INK,
    "button_secondary_border_color": LINE,
    "checkbox_background_color": CARD,
    "checkbox_background_color_selected": ACCENT,
    "checkbox_border_color": LINE,
    "checkbox_border_color_selected": ACCENT,
    "checkbox_border_color_focus": ACCENT,
    "checkbox_label_background_fill": CARD,
    "checkbox_label_background_fill_hover": CARD,
    "checkbox_label_background_fill_selected": CARD,
    "checkbox_label_border_color": LINE,
    "checkbox_label_border_color_selected": ACCENT,
    "checkbox_label_text_color": INK,
    "checkbox_label_text_color_selected": INK,
    "slider_color": ACCENT,
    "code_background_fill": CARD,
    "stat_background_fill": ACCENT,
}
PLAIN: dict[str, Any] = {
    "block_border_width": "0px",
    "block_border_width_dark": "0px",
    "block_shadow": "none",
    "block_shadow_dark": "none",
    "block_padding": "0px",
    "block_label_border_width": "0px",
    "block_title_text_weight": "500",
    "block_title_text_size": "0.8rem",
    "input_shadow": "none",
    "input_shadow_focus": "none",
    "input_radius": "8px",
    "layout_gap": "18px",
    "button_large_radius": "8px",
}


def theme() -> Base:
    """A quiet theme: paper and ink, one accent, and fonts that are there already."""
    sans = ("system-ui", "-apple-system", "Segoe UI", "Helvetica", "Arial", "sans-serif")
    mono = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")
    made = Base(font=sans, font_mono=mono)
    for name, (light, dark) in COLOURS.items():
        made.set(**{name: light, f"{name}_dark": dark})
    return made.set(**PLAIN)
