"""A page in the browser to talk to a model: uploads, streamed answers, and a picture of what the model sees.

It listens on loopback, opens no file except uploads, and sends nothing to other hosts. Needs the extra `web` (gradio).
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eagle_model.processor import RequestPlan
from eagle_model.visual import VideoPlan, VideoRef, read_video
from eagle_sampling import MediaError
from eagle_tiling import draw_grid, tile_count
from eagle_train.config import ConfigError
from eagle_train.runs.chat import Chat

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".ts", ".pdf")
#: Largest upload, and most of them in one message.
MAX_UPLOAD, MAX_FILES = "500mb", 32
#: Frames of a video that the page shows; all of them are used for the answer.
SHOWN_FRAMES = 24


def check_gradio() -> None:
    """Raises ConfigError when gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("--web needs gradio, which is not installed; install it with: pip install 'eagle-train[web]'")


def sort_uploads(paths: list[str], folder: Path) -> tuple[list[str], list[str]]:
    """Images, and videos and documents, of uploaded files. folder: where uploads are stored.

    Raises MediaError for a file of another kind, outside of the folder, or one too many.
    """
    if len(paths) > MAX_FILES:
        raise MediaError(f"{len(paths)} files are attached; at most {MAX_FILES} fit into one message")
    images, videos = [], []
    for path in paths:
        if not Path(path).resolve().is_relative_to(folder.resolve()):
            raise MediaError(f"{Path(path).name} is not an upload of this page")
        suffix = Path(path).suffix.lower()
        if suffix not in (*IMAGES, *VIDEOS):
            raise MediaError(f"{Path(path).name}: is not an image, a video or a PDF; known are {', '.join((*IMAGES, *VIDEOS))}")
        (images if suffix in IMAGES else videos).append(path)
    return images, videos


def pictures(request: RequestPlan) -> list[tuple[Any, str]]:
    """What the model sees of a request: a drawing of each image's tiles, and frames of each video with their times."""
    shown: list[tuple[Any, str]] = []
    spec = request.spec
    for number, (image, grid) in enumerate(zip(request.images, request.plan.grids), start=1):
        tiles = tile_count(grid, thumbnail=spec.thumbnail)
        drawing = draw_grid(image, grid, tile_size=spec.tile_size, thumbnail=spec.thumbnail, longest=768)
        shown.append((drawing, f"image {number}: {grid[0]} x {grid[1]}, {tiles} tiles, {tiles * spec.tokens_per_tile} tokens"))
    for number, (video, plan) in enumerate(zip(request.videos, request.plan.videos), start=1):
        places = np.unique(np.linspace(0, plan.count - 1, min(plan.count, SHOWN_FRAMES)).astype(int))
        for place, frame in zip(places.tolist(), _frames(video, plan, places, spec.tile_size)):
            time = "" if plan.shown is None else f"{plan.shown[place]:.2f} s, "
            shown.append((frame, f"{time}{'page' if video.is_document else 'frame'} {place + 1} of {plan.count}, video {number}"))
    return shown


def _frames(video: VideoRef, plan: VideoPlan, places: np.ndarray, side: int) -> np.ndarray:
    """uint8 [n, s, s, 3]: some frames of a plan."""
    out = np.empty((len(places), side, side, 3), np.uint8)
    times = None if plan.times is None else plan.times[places]
    indices = None if plan.indices is None else plan.indices[places]
    read_video(out, video, VideoPlan(len(places), times=times, indices=indices))
    return out


def budget_text(request: RequestPlan, tokens: int) -> str:
    """The tokens of a request in one line. tokens: length of its prompt."""
    k = request.spec.tokens_per_tile
    tiles = sum(tile_count(grid, thumbnail=request.spec.thumbnail) for grid in request.plan.grids)
    frames = sum(video.count for video in request.plan.videos)
    limit = "no limit" if request.max_tokens is None else f"{request.max_tokens} allowed"
    visual = (tiles + frames) * k
    return (
        f"{tokens} tokens ({limit}): {tiles * k} for {tiles} tiles, {frames * k} for {frames} frames or pages, {tokens - visual} for text"
    )


def make_page(new_chat: Callable[[], Chat], title: str, uploads: Path) -> Any:
    """The page, a `gradio.Blocks`. new_chat: a conversation for one visitor. uploads: the folder of gradio's uploads."""
    import gradio as gr

    processor = new_chat().processor
    spec = processor.spec

    def respond(
        message: dict[str, Any],
        history: list[Any],
        chat: Chat | None,
        length: float,
        temperature: float,
        tiles: float,
        fps: float,
        tokens: float,
    ) -> Iterator[tuple[Any, ...]]:
        chat = chat or new_chat()
        question, files = message["text"].strip(), message["files"]
        if not question:
            raise gr.Error("Write a question.", duration=None)
        chat.max_new_tokens, chat.temperature = int(length), temperature
        chat.settings |= {"max_tiles": int(tiles), "fps": fps, "max_tokens": int(tokens)}
        try:
            media = sort_uploads(files, uploads)
            request = chat.plan(question, *media)
            shown = pictures(request)
            budget = budget_text(request, len(request.encode(processor.costs.encoder).input_ids))
            history = [*history, *({"role": "user", "content": {"path": file}} for file in files), {"role": "user", "content": question}]
            history.append({"role": "assistant", "content": ""})
            yield None, history, chat, shown, budget
            for piece in chat.stream(question, *media, request=request):
                history[-1] = {"role": "assistant", "content": history[-1]["content"] + piece}
                yield None, history, chat, shown, budget
        except ValueError as error:  # prompts, media and budgets: messages for the person who asked
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    def restart() -> tuple[Any, ...]:
        return [], None, [], ""

    def stop(chat: Chat | None) -> None:
        if chat is not None:
            chat.stop()

    page = gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 24 * 3600))
    with page:
        gr.Markdown(f"## {title}")
        conversation = gr.State(None, time_to_live=24 * 3600)
        with gr.Row():
            with gr.Column(scale=3):
                # Markdown of an answer could name pictures of other hosts, which the browser would fetch.
                history = gr.Chatbot(label="Conversation", height=420, render_markdown=False, elem_id="history", buttons=["copy"])
                message = gr.MultimodalTextbox(
                    label="Question", placeholder="Ask about an image, a video or a PDF", file_count="multiple",
                    file_types=[*IMAGES, *VIDEOS], sources=["upload"], elem_id="question",
                )  # fmt: skip
                with gr.Row():
                    stop_button, new_button = gr.Button("Stop"), gr.Button("New conversation")
            with gr.Column(scale=2):
                budget = gr.Markdown(elem_id="budget")
                gallery = gr.Gallery(
                    label="What the model sees",
                    columns=2,
                    height=360,
                    object_fit="contain",
                    elem_id="seen",
                    buttons=["download", "fullscreen"],
                )
                with gr.Accordion("Parameters", open=False):
                    length = gr.Slider(1, 4096, 256, step=1, label="Longest answer in tokens")
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)")
                    tiles = gr.Slider(
                        spec.min_tiles, max(spec.max_tiles, spec.min_tiles + 1), spec.max_tiles, step=1, label="Tiles of an image"
                    )
                    fps = gr.Slider(0.1, 10, spec.fps, step=0.1, label="Frames per second of video")
                    tokens = gr.Number(processor.max_tokens or 32768, precision=0, minimum=64, label="Token budget of the prompt")
        outputs = [message, history, conversation, gallery, budget]
        settings = [length, temperature, tiles, fps, tokens]
        message.submit(respond, [message, history, conversation, *settings], outputs, concurrency_limit=1, api_visibility="private")
        stop_button.click(stop, conversation, None, queue=False, api_visibility="private")
        new_button.click(restart, None, [history, conversation, gallery, budget], api_visibility="private")
    return page


def run_page(folder: Path, *, port: int = 7860, device: str | None = None, system: str | None = None, block: bool = True) -> Any:
    """Load a model and serve its page on http://127.0.0.1:port. block: return only when it ends, else give the running page.

    Raises ConfigError when gradio is missing or the folder holds no model.
    """
    check_gradio()
    uploads = Path(tempfile.mkdtemp(prefix="eagle-uploads-"))
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(uploads), "HF_HUB_DISABLE_TELEMETRY": "1"}
    opened = Chat.open(folder, device=device)
    page = make_page(lambda: Chat(opened.model, opened.processor, system=system), f"Eagle: {folder.resolve().name}", uploads)
    page.queue(max_size=32)
    page.launch(
        server_name="127.0.0.1", server_port=port, share=False, max_file_size=MAX_UPLOAD, allowed_paths=[], footer_links=[],
        enable_monitoring=False, mcp_server=False, ssr_mode=False, pwa=False, quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    print(f"http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return page
