"""How the pages look: a theme in the machine's own fonts, a little CSS, and a rule that nothing foreign is fetched."""

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Pages must work without a network and tell nobody about their visitors, not even when an answer of the model holds
# the address of a picture: the browser refuses whatever is not from this server. Gradio's own pages need the inline
# styles and scripts.
_CONTENT_RULE = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "frame-ancestors 'self'"
)


class ContentRule:
    """Adds the Content-Security-Policy to every answer of the app that it wraps (ASGI middleware)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_rule(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _CONTENT_RULE
            await send(message)

        await self._app(scope, receive, send_with_rule)


CSS = """
.gradio-container { max-width: 860px !important; width: 100%; margin: 0 auto !important; }
.gradio-container .main, .gradio-container main.contain { width: 100%; min-width: 0; }
#header { align-items: center; justify-content: space-between; gap: 8px 16px; flex-wrap: wrap; }
#title { flex: 1 1 200px; min-width: 160px !important; }
#title h1 { font-size: 1.5rem; font-weight: 650; letter-spacing: -0.01em; margin: 0 0 2px; }
#title p { color: var(--body-text-color-subdued); margin: 0; font-size: 0.95rem; }
#status { flex: 0 1 auto; min-width: 0 !important; width: auto !important; padding: 0; }
#status .state { display: inline-flex; align-items: center; gap: 8px; padding: 4px 12px; border-radius: 14px;
  border: 1px solid var(--border-color-primary); font-size: 0.85rem; color: var(--body-text-color-subdued);
  overflow-wrap: anywhere; }
#status .light { flex: none; width: 8px; height: 8px; border-radius: 50%; background: var(--neutral-400); }
#status .ready .light { background: #3f9b63; }
#status .loading .light { background: #d29a2c; animation: breathe 1.6s ease-in-out infinite; }
#status .dead .light, #status .stopped .light, #status .unreachable .light { background: #c94f4f; }
@keyframes breathe { 50% { opacity: 0.3; } }
@media (prefers-reduced-motion: reduce) { #status .loading .light { animation: none; } }
#chat, #box, #settings { border-radius: 14px; }
#chat { height: calc(100dvh - 270px) !important; min-height: 320px !important; flex: none !important; }
#chat .bubble-wrap { background: transparent; }
#box { overflow: hidden; }
#chat .placeholder-content { width: 100%; height: auto; min-height: 100%; justify-content: center;
  padding: 12px; box-sizing: border-box; }
#chat .placeholder { width: 100%; flex: none; text-align: center; margin: 0 0 12px; }
#chat .placeholder p { color: var(--body-text-color-subdued); margin: 4px 0 0; }
#chat .examples { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; width: 100%;
  max-width: 620px; margin: 0 auto; padding: 0; }
#chat .example { min-width: 0; max-width: none; width: 100%; padding: 10px; border-radius: 12px;
  border: 1px solid var(--border-color-primary); background: transparent; box-shadow: none; }
#chat .example:hover, #chat .example:focus-visible { border-color: var(--primary-400); }
#chat .example-content { flex-direction: row; align-items: center; gap: 12px; height: auto; text-align: left; }
#chat .example-image-container { flex: none; margin: 0; width: 72px; height: 72px; }
#chat .example-image-container img { width: 72px; height: 72px; object-fit: cover; border-radius: 8px; }
#chat .message { border: none; box-shadow: none; border-radius: 14px; }
#chat .message.user { background: color-mix(in srgb, var(--primary-500) 13%, var(--background-fill-secondary)); }
#chat .message.bot { background: var(--background-fill-secondary); }
#chat .message.user.component { background: transparent; padding: 0; }
#chat .image-frame img { width: auto; max-width: min(280px, 60vw); max-height: 240px; border-radius: 12px; }
#chat .message-buttons-right { display: none; }
#footer p { text-align: center; color: var(--body-text-color-subdued); font-size: 0.8rem; margin: 0; }
@media (max-width: 560px) {
  #chat .example-content { flex-direction: column; align-items: flex-start; }
  #chat { height: calc(100dvh - 290px) !important; }
}
"""

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "monospace")


def page_theme() -> gr.themes.Base:
    """A calm theme, light and dark, in fonts that the visitor's machine already has."""
    return gr.themes.Soft(
        primary_hue=gr.themes.colors.orange,
        secondary_hue=gr.themes.colors.stone,
        neutral_hue=gr.themes.colors.stone,
        font=[gr.themes.Font(name) for name in _SANS],
        font_mono=[gr.themes.Font(name) for name in _MONO],
    ).set(
        body_background_fill="*neutral_50",
        block_background_fill="white",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_padding="0",
    )
