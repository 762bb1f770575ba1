"""`eagle serve` and `vllm.yaml`: the arguments that vLLM gets; what is refused before it starts."""

import pytest
import yaml

from eagle_model import EagleProcessor
from eagle_train.config import ConfigError
from eagle_train.runs.serve import NO_DOMAIN, check_vllm, server_command, server_options, write_options
from tests.support.models import small_tokenizer, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported")
    model = tiny_model(tokenizer=small_tokenizer())
    model.save_pretrained(path)
    EagleProcessor.for_config(small_tokenizer(), model.config, max_tokens=4096).save_pretrained(path)
    return path


def test_nothing_is_open_by_default(folder):
    """Loopback only, no host to fetch from, no local files, and the context of training."""
    options = server_options(folder)
    assert options == {"host": "127.0.0.1", "port": 8000, "allowed-media-domains": [NO_DOMAIN], "max-model-len": 4096}
    assert server_options(folder, max_tokens=100, domains=["a.org"])["allowed-media-domains"] == ["a.org"]
    assert server_options(folder, max_tokens=100)["max-model-len"] == 100


def test_the_command_has_every_option(folder):
    command = server_command(folder, {"port": 1, "allowed-media-domains": ["a", "b"]}, ["--dtype", "half"])
    assert command[1:] == [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--port", "1", "--allowed-media-domains", "a", "b", "--dtype", "half"),
    ]


def test_the_options_file_is_that_of_the_command(folder):
    assert yaml.safe_load(write_options(folder).read_text()) == server_options(folder)


def test_what_cannot_be_served_is_refused(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"eagle export .* --vllm"):
        server_options(tmp_path)
    with pytest.raises(ConfigError, match="not a folder"):
        server_options(tmp_path / "none")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="uv pip install 'vllm=="):
        check_vllm()


def test_the_verb(folder, tmp_path, capsys):
    """`--dry-run` prints the command; arguments that eagle does not know go to vLLM."""
    from eagle_train.cli.main import main

    with pytest.raises(SystemExit) as end:
        main(["serve", str(folder), "--port", "9", "--media", str(tmp_path), "--dry-run", "--tensor-parallel-size", "2"])
    assert not end.value.code
    line = capsys.readouterr().out.strip()
    assert line.endswith(f"--allowed-local-media-path {tmp_path} --tensor-parallel-size 2")
    assert "--host 127.0.0.1 --port 9" in line
    with pytest.raises(SystemExit) as end:
        main(["serve", str(folder), "--media", str(tmp_path / "none")])
    assert end.value.code == 2
