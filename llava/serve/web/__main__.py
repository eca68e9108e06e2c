"""``python -m llava.serve.web``: a page in the browser and an OpenAI-compatible endpoint for one or two models."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from llava.command import CommandParser, check_at_least, run_command

if TYPE_CHECKING:
    from llava.serve.web.engine import Engine
    from llava.serve.web.server import ServerOptions

PORT = 7860
_LIMITS: dict[str, tuple[type, float, float, str]] = {
    "max_upload_mb": (int, 1, 64, "largest image or clip, in MiB"),
    "max_media": (int, 1, 8, "most images and videos of one request"),
    "max_video_seconds": (float, 0.1, 600, "longest clip"),
    "max_image_pixels": (int, 1, 40_000_000, "most pixels of an image, or of a frame"),
    "decode_timeout": (float, 0.1, 30, "seconds that decoding one file may take"),
    "max_queue": (int, 1, 32, "most requests that wait or run; one more gets status 429"),
    "max_batch": (int, 1, 8, "most requests that are answered together"),
    "max_new_tokens": (int, 1, 512, "longest answer that may be asked for"),
}


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.serve.web",
        description="A page in the browser and an OpenAI-compatible endpoint for one or two trained models.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="checkpoint folder; two are shown side by side")
    parser.add_argument("--vision_tower", metavar="DIR", help="where the models' vision tower lies, if it has moved")
    parser.add_argument("--model_base", metavar="DIR", help="where the base model of adapters lies, if it has moved")
    parser.add_argument(
        "--bits", type=int, default=16, choices=(16, 8, 4), help="bits of the linear layers (default 16: as they come)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: GPUs if there are any)")
    parser.add_argument("--plugins", nargs="+", metavar="MODULE", help="modules to import first (docs/extending.md)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default 127.0.0.1; any but this machine's own needs a token)",
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"0 is any that is free (default {PORT})")
    parser.add_argument(
        "--token",
        metavar="TEXT",
        help="what visitors must know; other users of this machine can see it: --token_file hides it",
    )
    parser.add_argument("--token_file", metavar="FILE", help="a file that holds the token")
    parser.add_argument(
        "--allow_remote_urls", action="store_true",
        help="let requests name images and videos by http address, of public hosts (default: refused)",
    )  # fmt: skip
    parser.add_argument("--share", action="store_true", help="a public address through Gradio's servers; needs a token")
    parser.add_argument("--no_page", action="store_true", help="the endpoint alone, without Gradio")
    for name, (kind, _, default, meaning) in _LIMITS.items():
        parser.add_argument(
            f"--{name}", type=kind, default=default, metavar="N" if kind is int else "X",
            help=f"{meaning} (default {default})",
        )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until ^C; returns the exit status, 2 with one line on standard error for a user's mistake."""
    return run_command(lambda: serve(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a ValueError for flags that are wrong, or that need others."""
    args = build_parser().parse_args(argv)
    check_at_least(args, {name: least for name, (_, least, _, _) in _LIMITS.items()})
    if len(args.models) > 2:
        raise ValueError(f"{len(args.models)} models were given; one is served, or two side by side")
    if args.token is not None and args.token_file is not None:
        raise ValueError("--token and --token_file were both given; give one")
    if args.no_page and args.share:
        raise ValueError("--share is the page's; leave out --no_page")
    return args


def read_options(args: argparse.Namespace) -> ServerOptions:
    """Where the server listens and who may ask it; a ValueError for what strangers could use."""
    from llava.serve.web.server import ServerOptions, read_token

    token = args.token if args.token_file is None else read_token(args.token_file)
    options = ServerOptions(args.host, args.port, token, args.allow_remote_urls, args.share)
    options.check()
    return options


def serve(args: argparse.Namespace) -> None:
    """Load the models and answer requests until the process is told to stop.

    Raises:
        ValueError: a flag, a checkpoint, the device or the address is not as it must be, or a package is missing.
    """
    from llava.serve.web.server import address_of, build_app, build_server, name_models, open_socket, share

    options = read_options(args)
    names = name_models(args.models)
    # Before a model is loaded: an address that is taken, and a package that is not there, are known at once.
    build_server(None)
    if not args.no_page:
        from llava.serve.web.page import Page, check_gradio

        check_gradio()
    # uvicorn ends in good order at ^C and SIGTERM, and then raises the signal again: uploads are deleted first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    listening = open_socket(options.host, options.port)
    engine = load_engine(args, names)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for noisy in ("httpx", "httpcore", "uvicorn", "asyncio", "multipart", "python_multipart"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app, endpoint = build_app(engine, options, None if args.no_page else Page(engine).add_to)
        server = build_server(app)
        url = address_of(listening)
        print(
            f"{' and '.join(names)}: {'endpoint' if args.no_page else f'page at {url}, endpoint'} at {url}/v1",
            flush=True,
        )
        if options.share:
            print(f"for everybody who knows the token: {share(listening.getsockname()[1])}", flush=True)
        server.run([listening])
        endpoint.close()
    finally:
        engine.close()


def load_engine(args: argparse.Namespace, names: Sequence[str]) -> Engine:
    """The models behind their queue."""
    from transformers import logging as transformers_logging

    from llava.registry import import_plugins
    from llava.serve.generate import Captioner
    from llava.serve.web.engine import Engine, QueueLimits
    from llava.serve.web.uploads import UploadLimits, Uploads

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    import_plugins(args.plugins)
    captioners = {
        name: Captioner.from_checkpoint(
            path, args.vision_tower, args.device, model_base=args.model_base, bits=args.bits
        )
        for name, path in zip(names, args.models, strict=True)
    }
    uploads = Uploads(UploadLimits(**{one.name: getattr(args, one.name) for one in fields(UploadLimits)}))
    return Engine(
        captioners, uploads, QueueLimits(**{one.name: getattr(args, one.name) for one in fields(QueueLimits)})
    )


if __name__ == "__main__":
    sys.exit(main())
