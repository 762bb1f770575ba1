"""The command line: instant help that is up to date, exit codes that mean something, errors without traceback."""

import errno
import importlib
import json
import os
import re
import resource
import subprocess
import sys
from importlib.metadata import version

import pytest

from eagle_train.cli.app import VERBS
from eagle_train.cli.main import main, report
from eagle_train.cli.pages import rendered_page, stored_page, verbs
from eagle_train.config import Config, ConfigError, dump_config
from eagle_train.distributed.world import DeviceError
from eagle_train.errors import EvaluationError
from eagle_train.runs.evaluate import eval_overrides


def eagle(*arguments, cwd=None):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, "-m", "eagle_train.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=280)


@pytest.mark.parametrize("verb", ["", *verbs()])
def test_stored_help_has_the_options_that_exist(verb):
    def names(page):
        return set(re.findall(r"^ +(?:-\w, )?(--?[a-z-]+|[a-z]\w*)(?=[ \n])", page or "", flags=re.MULTILINE)) | set(
            re.findall(r"--[a-z-]+", page or "")
        )

    stored = stored_page([*verb.split(), "--help"])
    assert "Usage: eagle" in stored
    assert names(stored) == names(rendered_page(verb)), "render the pages anew: eagle_train.cli.pages.store()"


@pytest.mark.parametrize("verb", ["", "train", "lmdb build"])
def test_help_takes_less_than_a_third_of_a_second(verb):
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = eagle(*verb.split(), "--help")
        times.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
        assert done.returncode == 0
        assert "Usage" in done.stdout
    assert min(times) < 0.3  # of a CPU: the wall clock belongs to whatever else runs here


def test_summaries_of_verbs_are_whole():
    commands = stored_page(["--help"]).partition("Commands:")[2]
    assert sorted(line.split()[0] for line in commands.strip().splitlines()) == sorted(VERBS)
    assert "..." not in commands
    assert stored_page(["chat", "RUN", "--help"]) is None
    assert stored_page(["chat", "RUN"]) is None
    assert stored_page([]) == stored_page(["-h"])


def test_help_imports_nothing_heavy():
    code = "import sys; from eagle_train.cli.app import command; command(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "eagle_train.cli.train" in modules
    assert not {"torch", "transformers", "numpy", "pydantic", "yaml", "av"} & set(modules)


def test_version(eagle_here):
    done = eagle_here("--version")
    assert done.returncode == 0
    assert done.stdout == f"eagle-train {version('eagle-train')}\n"


def test_exit_codes_and_messages(colour_run, tmp_path, eagle_here):
    done = eagle_here("paint")
    assert done.returncode == 2
    assert "No such command 'paint'" in done.stderr
    done = eagle("plan", tmp_path / "nothing.yaml")
    assert done.returncode == 2
    assert "nothing.yaml: can't be read" in done.stderr
    assert "Traceback" not in done.stderr
    path = tmp_path / "run.yaml"
    config = colour_run()
    path.write_text(dump_config(config))
    done = eagle_here("plan", path, "--set", "stages.0.max_token=5")
    assert done.returncode == 2
    assert "did you mean 'max_tokens'?" in done.stderr
    done = eagle_here("report", tmp_path)
    assert done.returncode == 2
    assert "is not a run folder: it has no config.yaml" in done.stderr
    with pytest.raises(ConfigError):
        main(["plan", str(tmp_path / "nothing.yaml"), "--debug"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quickstart", "--device", "bogus"], "device 'bogus': expected cpu or cuda"),
        (["train", "RUN.yaml", "--device", "cuda:1"], "device 'cuda:1': expected cpu or cuda"),
        (["chat", "RUN", "--device", "gpu"], "device 'gpu': expected cpu or cuda"),
        (["train", "RUN.yaml", "--fresh"], "--dir and --fresh are the quickstart's"),
        (["train", "RUN.yaml", "--dir", "here"], "--dir and --fresh are the quickstart's"),
        (["eval", "RUN", "--limit", "0"], "Invalid value for '--limit'"),
    ],
)
def test_what_the_user_must_change_ends_with_2(colour_run, tmp_path, monkeypatch, eagle_here, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN.yaml").write_text(dump_config(colour_run()))
    done = eagle_here(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "no message of its own" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("verb", "what"), [("train", "nothing was trained yet"), ("prepare", "measures no row again"), ("plan", "")])
def test_interrupted_says_what_the_same_command_does(tmp_path, monkeypatch, eagle_here, verb, what):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("eagle_train.config.load_config", interrupt)
    done = eagle_here(verb, tmp_path / "run.yaml")
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert what in done.stderr
    assert ("same command" in done.stderr) == (verb == "prepare")


def test_a_failed_evaluation_ends_with_4_after_everything_else(colour_run, tmp_path, eagle_here, monkeypatch):
    def fails(*arguments, **options):
        raise TypeError("forward has no argument cache")

    monkeypatch.setattr("eagle_train.runs.evaluate.evaluate", fails)
    data = {"sources": {"rows": {"annotation": "rows.jsonl"}}, "eval_sources": {"held": {"annotation": "rows.jsonl"}}, "workers": 1}
    config = colour_run(data=data)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    done = eagle_here("train", tmp_path / "run.yaml", "--device", "cpu")
    assert done.returncode == 4, done.stderr
    assert "error: training is complete, but 3 of its evaluations failed:" in done.stderr
    assert "the evaluation of stage final after step 6 failed: TypeError: forward has no argument cache" in done.stderr
    assert f"eagle eval {config.run.folder} evaluates them again" in done.stderr.splitlines()[-1]
    assert "no message of its own" not in done.stderr
    assert (config.run.folder / "plot.png").exists()
    assert f"run folder: {config.run.folder}" in done.stdout


def test_the_folder_of_an_adapter_says_what_to_do(tmp_path, eagle_here):
    (tmp_path / "adapter_config.json").write_text("{}")
    done = eagle_here("chat", tmp_path, "hi", "--device", "cpu")
    assert done.returncode == 2
    assert "holds an adapter in PEFT's format and no model; eagle export RUN FOLDER without --adapter" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "qwen2", "hidden_size": 1e9}', "model_type is 'qwen2', and only 'eagle_2_5_vl' can be loaded"),
        ('{"hidden_size": 896}', "model_type is None"),
        ("[1]", "model_type is None"),
        ("{", "config.json: can't be read as JSON"),
        (None, "holds no model: it has neither config.yaml nor config.json"),
    ],
)
def test_a_folder_of_another_model_is_refused_before_anything_is_allocated(tmp_path, eagle_here, monkeypatch, content, message):
    def allocate(*arguments, **options):
        pytest.fail("a model was made")

    monkeypatch.setattr("eagle_model.eagle.EagleForConditionalGeneration.__init__", allocate)
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    done = eagle_here("chat", tmp_path, "hi", "--device", "cpu")
    assert done.returncode == 2
    assert message in done.stderr
    assert "give the folder of a run of eagle train" in done.stderr
    (tmp_path / "rows.jsonl").touch()
    done = eagle_here("eval", tmp_path, "--device", "cpu", "--data", tmp_path / "rows.jsonl")
    assert done.returncode == 2
    assert message in done.stderr
    assert "is not a folder" in eagle_here("chat", tmp_path / "nothing", "hi", "--device", "cpu").stderr


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ConfigError("3 ranks don't fit"), False),
        (EvaluationError("of two evaluations one failed"), False),
        (DeviceError("local rank 1 finds no GPU"), True),
        (ValueError("only here"), True),
    ],
)
def test_ranks_report_an_error_once(monkeypatch, capsys, tmp_path, error, shown):
    """The main rank prints it; another rank prints its own error, with its number. torchrun's summary has it in any case."""
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank))
        report(error)
        printed = capsys.readouterr().err
        prefix = "" if rank == "0" else "rank 1: "
        assert printed == (f"error: {prefix}{error}\n" if rank == "0" or shown else "")
        message = json.loads((tmp_path / rank).read_text())["message"]
        assert message["message"] == message["extraInfo"]["py_callstack"] == f"{prefix}{error}"


def test_a_preset_that_does_not_exist_is_named_before_the_tokenizer(tmp_path, eagle_here):
    (tmp_path / "run.yaml").write_text("model: {preset: smollm2}\ndata: {sources: {s: {annotation: rows.jsonl}}}\n")
    done = eagle_here("plan", tmp_path / "run.yaml")
    assert done.returncode == 2
    assert "model.preset: there is no preset 'smollm2'; known: tiny" in done.stderr
    (tmp_path / "run.yaml").write_text("model: {path: SmolLM2}\ndata: {sources: {s: {annotation: rows.jsonl}}}\n")
    assert "model.path: " in eagle_here("plan", tmp_path / "run.yaml").stderr


def test_too_many_bad_rows_end_with_3(colour_run, tmp_path):
    config = colour_run()
    for index in range(20):
        (tmp_path / f"{index}.png").unlink()
    (tmp_path / "run.yaml").write_text(dump_config(config))
    done = eagle("prepare", tmp_path / "run.yaml")
    assert done.returncode == 3
    assert "media-missing" in done.stderr
    assert "Traceback" not in done.stderr


def test_from_plan_to_report(colour_run, tmp_path, eagle_here):
    """plan, show, train, report and chat with one configuration, as a user would."""
    path = tmp_path / "run.yaml"
    config = colour_run()
    path.write_text(dump_config(config))
    planned = eagle_here("plan", path)
    assert planned.returncode == 0, planned.stderr
    assert [line.split()[0] for line in planned.stdout.splitlines()[:3]] == ["stage", "one", "two"]
    assert not (config.run.folder / "checkpoints").exists()
    explained = eagle_here("plan", path, "--show-defaults", "--set", "sampling={fps: 2.0}").stdout
    assert "default  sampling.min_frames = 8\n" in explained
    assert "default  sampling.fps" not in explained
    shown = eagle_here("show", path, "--row", "rows:1", "--html", tmp_path / "row.html")
    assert shown.returncode == 0, shown.stderr
    assert "color?" in shown.stdout
    assert "data:image/jpeg;base64," in (tmp_path / "row.html").read_text()
    refused = eagle_here("show", path, "--row", "rows:999")
    assert refused.returncode == 2
    trained = eagle_here("train", path, "--device", "cpu")
    assert trained.returncode == 0, trained.stderr
    assert f"run folder: {config.run.folder}" in trained.stdout
    assert "default  " not in trained.stdout
    assert (config.run.folder / "plot.png").stat().st_size > 5000
    reported = eagle_here("report", config.run.folder)
    assert "stage two: step 2 of 2" in reported.stdout
    # However many ranks it was trained on, one process can evaluate and export it.
    written = config.run.folder / "config.yaml"
    assert "ulysses: 1" in written.read_text()
    written.write_text(written.read_text().replace("ulysses: 1", "ulysses: 2").replace("  data: null", "  data: 3"))
    # What the run wrote itself is never replaced by an evaluation.
    (config.run.folder / "answers.jsonl").write_text("the run's own")
    ledger = (config.run.folder / "ledger.jsonl").read_text() if (config.run.folder / "ledger.jsonl").exists() else None
    evaluate = ("eval", config.run.folder, "--limit", 2, "--device", "cpu", "--data")
    for out in ((), (), ("--out", tmp_path / "mine")):
        done = eagle_here(*evaluate, tmp_path / "rows.jsonl", *out)
        assert done.returncode == 0, done.stderr
    answers = [tmp_path / "mine" / "answers.jsonl", *(config.run.folder / "evaluations").glob("*/answers.jsonl")]
    assert [len(path.read_text().splitlines()) for path in answers] == [2, 2, 2]
    taken = eagle_here(*evaluate, tmp_path / "rows.jsonl", "--out", tmp_path / "mine")
    assert taken.returncode == 2
    assert "mine exists and is not an empty folder; name another one" in taken.stderr
    (tmp_path / "bad.jsonl").write_text("{\n" * 20)
    bad = eagle_here(*evaluate, tmp_path / "bad.jsonl", "--out", tmp_path / "bad")
    assert bad.returncode == 3
    assert (tmp_path / "bad" / "ledger.jsonl").read_text().count("broken-json") == 20
    assert (config.run.folder / "answers.jsonl").read_text() == "the run's own"
    assert ledger == ((config.run.folder / "ledger.jsonl").read_text() if ledger is not None else None)
    exported = eagle_here("export", config.run.folder, tmp_path / "model", "--dtype", "float32")
    assert exported.returncode == 0, exported.stderr
    again = eagle_here("export", config.run.folder, tmp_path / "model")
    assert again.returncode == 2
    assert "model exists and is not an empty folder; name another one, or add --force" in again.stderr
    earlier = eagle_here("export", config.run.folder, tmp_path / "model", "--checkpoint", "one-end", "--force")
    assert "(stage one, step 4)" in earlier.stdout, earlier.stderr
    model = ("eval", tmp_path / "model", "--device", "cpu")
    scored = eagle_here(*model, "--data", tmp_path / "rows.jsonl", "--limit", 2, "--out", tmp_path / "of the model")
    assert scored.returncode == 0, scored.stderr
    assert re.search(r"^rows +2 +\d\.\d{3} +\d\.\d{3} - \d\.\d{3} +- +\d\.\d{4}$", scored.stdout, flags=re.MULTILINE), scored.stdout
    assert len((tmp_path / "of the model" / "answers.jsonl").read_text().splitlines()) == 2
    more = ("--frames", "1,2", "--metric", "f1", "--set", "eval.batch_size=2", "--out", tmp_path / "by frames")
    swept = eagle_here(*evaluate, tmp_path / "rows.jsonl", *more)
    assert swept.returncode == 0, swept.stderr
    assert len(re.findall(r"^rows +[12] +- +2 +0 ", swept.stdout, flags=re.MULTILINE)) == 2, swept.stdout
    names = {"answers.jsonl", "sweep.jsonl", "sweep.png"}
    assert names <= {path.name for path in (tmp_path / "by frames").iterdir()}
    assert {json.loads(line)["metric"] for line in (tmp_path / "by frames" / "answers.jsonl").read_text().splitlines()} == {"f1"}
    for options, text in [
        (("--frames", "4,x"), "--frames 4,x: 'x' is not a number of at least 1"),
        (("--metric", "bleu"), "--metric bleu: expected one of exact, "),
        (("--set", "run.seed=1"), "an evaluation changes keys of the section eval only"),
        (("--set", "eval.batch=1"), "did you mean 'batch_size'?"),
    ]:
        wrong = eagle_here(*evaluate, tmp_path / "rows.jsonl", *options)
        assert (wrong.returncode, text in wrong.stderr) == (2, True), wrong.stderr
    assert "name an annotation file with --data FILE" in eagle_here(*model).stderr
    for option in ("--data", "--root"):
        missing = eagle_here(*model, *(() if option == "--data" else ("--data", tmp_path / "rows.jsonl")), option, tmp_path / "missing")
        assert missing.returncode == 2
        assert missing.stderr.splitlines()[-1] == f"error: {option} {tmp_path / 'missing'} does not exist"
    assert "only a run has checkpoints" in eagle_here(*model, "--data", tmp_path / "rows.jsonl", "--checkpoint", "one-end").stderr
    missing = eagle_here("export", config.run.folder, tmp_path / "other", "--checkpoint", "one-finish")
    assert missing.returncode == 2
    assert "one-finish is neither a checkpoint of the run nor the folder of one" in missing.stderr
    assert "holds: one-end, two-end" in missing.stderr.replace("one-00000003, ", "")
    answered = eagle_here(
        "chat", config.run.folder, "what color?", "--image", tmp_path / "1.png", "--max-new-tokens", "3", "--device", "cpu"
    )
    assert answered.returncode == 0, answered.stderr


def test_a_reader_that_left_is_no_error_message():
    script = f"{sys.executable} -m eagle_train.cli train quickstart --help | true"
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=100).stderr == ""


def test_lmdb_build_and_check(tmp_path, picture, eagle_here):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(3):
        (images / f"{index}.png").write_bytes(picture(seed=index))
    built = eagle("lmdb", "build", tmp_path / "all.lmdb", images)
    assert built.returncode == 0, built.stderr
    assert "3 values" in built.stdout
    checked = eagle_here("lmdb", "check", tmp_path / "all.lmdb")
    assert checked.returncode == 0, checked.stderr
    (images / "3.png").write_bytes(b"no image")
    (images / "caf\udce9.png").write_bytes(picture())  # a name of the time before UTF-8
    built = eagle_here("lmdb", "build", tmp_path / "more.lmdb", images)
    assert built.returncode == 3, built.stderr
    assert "3.png: " in built.stdout
    assert "caf\\udce9.png: an LMDB key" in built.stdout
    assert "3 values" in built.stdout
    (tmp_path / "more.lmdb" / "manifest.json").write_text("{")
    checked = eagle_here("lmdb", "check", tmp_path / "more.lmdb")
    assert checked.returncode == 3
    assert checked.stdout.startswith(f"{tmp_path}/more.lmdb/manifest.json: is damaged")
    (tmp_path / "cut.lmdb").write_bytes((tmp_path / "all.lmdb" / "data.mdb").read_bytes()[:12000])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1garbage")
    (tmp_path / "empty").mkdir()
    for command, why in (
        (("check", tmp_path / "cut.lmdb"), "cut.lmdb: is cut off: 12000 of"),
        (("build", tmp_path / "none.lmdb", tmp_path / "bad.parquet"), "bad.parquet: can't be read as a Parquet file"),
        (("build", tmp_path / "no.lmdb", tmp_path / "empty"), "empty: holds no image"),
    ):
        done = eagle_here("lmdb", *command)
        assert done.returncode == 3
        assert why in done.stderr


def test_json_documents(colour_run, tmp_path, eagle_here):
    """`--json` prints one document and nothing else, with the numbers of the tables."""
    path = tmp_path / "run.yaml"
    data = {"sources": {"rows": {"annotation": "rows.jsonl"}}, "eval_sources": {"held": {"annotation": "rows.jsonl"}}, "workers": 1}
    config = colour_run(data=data, eval={"limit": 3})
    path.write_text(dump_config(config))
    planned = json.loads(eagle_here("plan", path, "--json", "--show-defaults", "--gpus", 2, "--set", "sampling={fps: 2.0}").stdout)
    assert [(stage["name"], stage["max_tokens"], stage["steps"]) for stage in planned["stages"]] == [("one", 640, 4), ("two", 1280, 2)]
    table = eagle_here("plan", path).stdout.splitlines()[1].split()
    first = planned["stages"][0]
    names = ("name", "max_tokens", "rows_used", "samples", "rows_dropped", "packs", "fill", "longest_sample", "tokens", "tiles")
    names += ("label_tokens", "steps_per_epoch", "steps")
    assert [f"{first[name]:.1%}" if name == "fill" else str(first[name]) for name in names] == table
    assert planned["rows"]["all"] == planned["rows"]["planned"] == 25
    assert planned["defaults"]["sampling.min_frames"] == 8
    assert planned["resources"]["gpus"] == 2
    assert planned["resources"]["memory"]["gpu"] > 0

    shown = json.loads(eagle_here("show", path, "--row", "rows:1", "--json", "--html", tmp_path / "row.html").stdout)
    [sample] = shown["samples"]
    assert (shown["capacity"], sample["source"], sample["line"]) == (None, "rows", 1)
    assert sample["tokens"]["length"] == sample["tokens"]["planned"]
    assert "".join(piece["text"] for piece in sample["pieces"] if piece["labelled"]).startswith("red")
    assert [piece["grid"] for piece in sample["pieces"] if piece["kind"] == "image"] == [[2, 1]]
    assert (tmp_path / "row.html").is_file()
    pack = json.loads(eagle_here("show", path, "--json").stdout)
    assert (pack["capacity"], len(pack["samples"]) > 1) == (640, True)

    assert eagle_here("train", path, "--device", "cpu").returncode == 0
    done = eagle_here("eval", config.run.folder, "--device", "cpu", "--limit", 2, "--json", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    scored = json.loads(done.stdout)
    assert (scored["checkpoint"]["stage_name"], scored["checkpoint"]["done"]) == ("two", True)
    [score] = scored["scores"]
    assert (score["source"], score["questions"]) == ("held", 2)
    assert {"accuracy", "text_only", "low", "high", "loss"} <= set(score)
    assert json.loads((tmp_path / "out" / "sweep.jsonl").read_text()) == score
    assert scored["files"] == {"scores": str(tmp_path / "out" / "sweep.jsonl"), "answers": str(tmp_path / "out" / "answers.jsonl")}
    swept = json.loads(eagle_here("eval", config.run.folder, "--device", "cpu", "--limit", 1, "--json", "--frames", "1,2").stdout)
    assert [score["frames"] for score in swept["scores"]] == [1, 2]
    assert swept["files"]["plot"].endswith("sweep.png")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"a": "b"}\n{"a": \n', r"rows\.jsonl:2: can't be read as JSON .*; repair the file"),
        ("photo.jpg", b"\xff\xd8\xff", r"photo\.jpg: is not UTF-8 text \(invalid start byte\); name a text, JSON or JSONL file"),
        ("folder", None, r"folder: is a folder; name the files"),
        ("nothing.txt", None, r"nothing\.txt: there is no such file; name the files"),
    ],
)
def test_a_tokenizer_of_a_wrong_file_names_the_file(tmp_path, eagle_here, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = eagle_here("tokenizer", "made", name)
    assert done.returncode == 2
    assert re.match(f"error: {message}", " ".join(done.stderr.split())), done.stderr
    assert not (tmp_path / "made").exists()


def test_a_metric_belongs_to_a_file_with_any_name(tmp_path, eagle_here, monkeypatch):
    """`rows.v2.jsonl.gz` made `eval.metrics.rows.v2.jsonl`, a key of keys."""
    verb = importlib.import_module("eagle_train.cli.eval")
    requests = []
    monkeypatch.setattr(verb, "_launch", lambda *_: None)
    monkeypatch.setattr(verb, "_evaluate_model", requests.append)
    path = tmp_path / "rows.v2 [1].jsonl.gz"
    path.touch()
    assert eagle_here("eval", tmp_path, "--data", path, "--metric", "contains").returncode == 0
    assert eval_overrides(Config(), requests[0].overrides).eval.metrics == {"rows.v2 [1].jsonl": "contains"}
    done = eagle_here("eval", tmp_path, "--data", path, "--metric", "exactly")
    assert (done.returncode, len(requests)) == (2, 1)
    assert "error: --metric exactly: expected one of exact, choice, contains, " in done.stderr


@pytest.mark.parametrize("option", [("show", "--html"), ("plan", "--rows"), ("data stats", "--html"), ("data stats", "--json")])
@pytest.mark.parametrize(("place", "reason"), [("there", "Is a directory"), ("nowhere/file.csv", "No such file or directory")])
def test_a_file_that_cannot_be_written_names_its_option(colour_run, tmp_path, eagle_here, option, place, reason):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(colour_run()))
    assert eagle_here("prepare", path).returncode == 0
    (tmp_path / "there").mkdir()
    verb, name = option
    done = eagle_here(*verb.split(), path, name, tmp_path / place)
    assert done.returncode == 2
    message = " ".join(done.stderr.split())
    assert f"error: {name} {tmp_path / place}: can't be written ({reason}); name a file in a folder that exists" in message
    assert not [left for left in tmp_path.iterdir() if left.name.endswith(".tmp")]


def test_a_place_without_rights_has_a_next_step(tmp_path, capsys):
    """As of a read-only disk; the tests may run as root, whom rights do not stop."""
    advice = "change its rights, or name another place (run.dir, data.facts, an output)"
    for number in (errno.EROFS, errno.EACCES, errno.EPERM):
        report(OSError(number, os.strerror(number), str(tmp_path)))
        assert capsys.readouterr().err == f"error: {tmp_path}: {os.strerror(number)}; {advice}\n"


def test_commands_to_copy_are_quoted(colour_run, tmp_path, eagle_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "then eagle plan 'my run.yaml'" in eagle_here("init", "my run.yaml").stdout
    assert "eagle plan 'an example/run.yaml', eagle show" in eagle_here("init", "--example", "an example").stdout
    (tmp_path / "other [1].yaml").write_text(dump_config(colour_run()))
    assert "eagle plan 'other [1].yaml' --gpus N" in eagle_here("plan", "other [1].yaml").stdout
