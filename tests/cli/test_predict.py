"""`r3d-kernels predict`: scores against an independent average, labels, JSON, several videos."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from r3d_kernels.cli import main, predict
from r3d_kernels.cli.common import CliError
from r3d_kernels.models import create_model, preset
from r3d_kernels.video import Transform, iter_clips, sample_clip

CLIP = str(sample_clip())
CARPHONE = str(sample_clip().with_name("carphone_pristine.mp4"))
CLASSES = ["run", "walk", "ride [a bike]", "swim", "read", "sing", "wait"]
SMALL = ["--size", "32", "--clip-stride", "35", "--batch", "3"]
ONE = ["--clip-stride", "1000"]  # one clip of a video


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create_model("hara_r3d_10", num_classes=len(CLASSES))
    with torch.no_grad():
        model(torch.randn(4, 3, 16, 32, 32))  # other statistics than the initial ones
        model.fc.weight.mul_(5)  # scores that differ
    return model.eval()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> str:
    """As 3D-ResNets-PyTorch saves it."""
    path = tmp_path_factory.mktemp("weights") / "save_1.pth"
    torch.save({"epoch": 1, "arch": "resnet-10", "state_dict": model.state_dict()}, path)
    return str(path)


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("labels") / "labels.txt"
    path.write_text("\n".join(CLASSES) + "\n\n")
    return str(path)


@pytest.fixture(scope="module")
def expected(model) -> dict[str, float]:
    """The scores of the small clip, four windows (the last one padded)."""
    transform = Transform(preset(model), size=32)
    with torch.no_grad():
        clips = [model(transform(clip)[None]).softmax(1)[0] for clip in iter_clips(CARPHONE, 16, 35)]
    assert len(clips) == 4
    return dict(zip(CLASSES, torch.stack(clips).mean(0).tolist(), strict=True))


def without_notes(stderr: str) -> str:
    """What is on stderr besides the remarks on the checkpoint."""
    return "".join(line for line in stderr.splitlines(True) if not line.startswith("note: "))


def test_says_how_frames_are_prepared(capsys, weights):
    assert main(["predict", CARPHONE, "--weights", weights, "--json", os.devnull, *SMALL, *ONE]) == 0
    assert "note: frames are prepared as for hara (resize 112" in capsys.readouterr().err
    argv = ["predict", CARPHONE, "--weights", weights, "--json", "-", *SMALL, *ONE]
    assert main([*argv, "--preset", "hara2018"]) == 0
    captured = capsys.readouterr()
    assert "note: frames are prepared as for hara2018 (" in captured.err
    assert main([*argv, "--preset", "hara1918"]) == 2
    assert "hara1918" in without_notes(capsys.readouterr().err)


@pytest.mark.parametrize("options", [[], ["--no-fused"], ["--arch", "hara_r3d_10", "--threads", "1"]])
def test_scores_are_the_average_over_the_clips(capsys, expected, weights, labels, options):
    argv = ["predict", CARPHONE, "--weights", weights, "--labels", labels, "--json", "-", "--topk", "9"]
    assert main([*argv, *SMALL, *options]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert list(results) == [CARPHONE]
    got = {row["label"]: row["score"] for row in results[CARPHONE]}
    assert got == pytest.approx(expected, abs=1e-5)
    assert list(got.values()) == sorted(got.values(), reverse=True)


def test_bf16(capsys, model, weights):
    argv = ["predict", CARPHONE, "--weights", weights, "--json", "-", "--topk", "7", "--dtype", "bf16"]
    assert main([*argv, "--size", "64", "--clip-stride", "60"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"][CARPHONE]
    assert sum(row["score"] for row in rows) == pytest.approx(1, abs=1e-6)


def test_one_bad_video_does_not_lose_the_others(capsys, tmp_path, weights):
    bad = tmp_path / "half.mp4"
    bad.write_bytes(Path(CLIP).read_bytes()[:200_000])
    out = tmp_path / "out.json"
    videos = [CARPHONE, str(bad), str(tmp_path / "none.mp4"), CLIP, CARPHONE]
    assert (
        main(["predict", *videos, "--weights", weights, "--json", str(out), "--topk", "2", *SMALL, *ONE]) == 2
    )
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = without_notes(captured.err).splitlines()
    assert re.fullmatch(rf"r3d-kernels: error: {re.escape(str(bad))}: .*truncated.*", errors[0])
    assert errors[1:] == [
        f"r3d-kernels: error: {tmp_path / 'none.mp4'}: no such file",
        "2 of 4 videos failed",
    ]
    results = json.loads(out.read_text())["results"]
    assert list(results) == [CARPHONE, CLIP]
    for rows in results.values():
        assert [set(row) for row in rows] == [{"label", "score"}] * 2
        assert all(row["label"] in {str(i) for i in range(7)} for row in rows)
        assert rows[0]["score"] >= rows[1]["score"]
    assert sorted(os.listdir(tmp_path)) == ["half.mp4", "out.json"]


def test_nothing_is_written_when_every_video_fails(capsys, tmp_path, weights):
    out = tmp_path / "out.json"
    assert main(["predict", "none.mp4", "--weights", weights, "--json", str(out)]) == 2
    assert without_notes(capsys.readouterr().err) == "r3d-kernels: error: none.mp4: no such file\n"
    assert not out.exists()


def test_table(capsys, weights, labels):
    assert (
        main(["predict", CARPHONE, "--weights", weights, "--labels", labels, "--topk", "7", *SMALL, *ONE])
        == 0
    )
    captured = capsys.readouterr()
    assert without_notes(captured.err) == ""
    assert CARPHONE in captured.out
    scores = [line.split(None, 1) for line in captured.out.splitlines() if re.match(r"\s+[01]\.\d{4} ", line)]
    assert sorted(name.strip() for _, name in scores) == sorted(CLASSES)


def test_random_weights(capsys):
    argv = ["predict", CARPHONE, "--arch", "hara_r3d_10", "--random-weights", "--json", "-", *SMALL, *ONE]
    assert main(argv) == 0
    assert len(json.loads(capsys.readouterr().out)["results"][CARPHONE]) == 5


def test_weights_of_another_network(capsys, weights):
    assert main(["predict", CARPHONE, "--arch", "hara_r3d_18", "--weights", weights]) == 2
    assert capsys.readouterr().err.startswith(f"r3d-kernels: error: --weights {weights}: ")


def test_wrong_number_of_labels(capsys, tmp_path, weights):
    path = tmp_path / "labels.txt"
    path.write_text("one\ntwo\n")
    assert main(["predict", CARPHONE, "--weights", weights, "--labels", str(path), *SMALL]) == 2
    assert (
        without_notes(capsys.readouterr().err)
        == "r3d-kernels: error: --labels has 2 names, the network has 7 classes\n"
    )


# -- labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "zero\none  \ntwo\n"),
        ("a.txt", "\ufeffzero\r\none\r\ntwo"),
        ("a.json", '["zero", "one", "two"]'),
        ("a.json", '{"0": "zero", "2": "two", "1": "one"}'),
        ("a.json", '{"\\"two\\"": 2, "one": 1, "zero": 0}'),
        ("a.json", '{"labels": ["zero", "one", "two"], "database": {}}'),
    ],
)
def test_labels(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    assert predict.read_labels(str(path)) == ["zero", "one", "two"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "has no names"),
        ("a.txt", b"one\n\nthree\n", "the name of class 1 is empty"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 text"),
        ("a.json", b"[1, 2]", "expected a list of names"),
        ("a.json", b"{", "Expecting property name"),
        ("a.json", b'{"0": "a", "2": "b"}', "the 2 class indices must be 0 to 1"),
        ("a.json", b'{"a": "b"}', "the keys of the dict must be class indices"),
        ("a.json", b"[]", "has no names"),
    ],
)
def test_bad_labels(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(CliError, match=re.escape(str(path)) + ".*" + message):
        predict.read_labels(str(path))


def test_weights_with_nan(capsys, model, tmp_path):
    """Valid JSON, and said twice: where the weights are read, and where the scores are written."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["fc.bias"][2] = float("nan")
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            main(["predict", CARPHONE, "--weights", str(path), "--json", "-", "--topk", "2", *SMALL, *ONE])
            == 0
        )
    captured = capsys.readouterr()
    assert "note: NaN or infinity in 1 of the tensors: fc.bias\n" in captured.err
    assert without_notes(captured.err) == ""
    got = json.loads(captured.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [row["score"] for row in got["results"][CARPHONE]] == [None, None]
    assert got["notes"][0] == f"results.{CARPHONE}[0].score is nan, written as null"


@pytest.fixture
def strange(tmp_path) -> str:
    """A clip whose name is no UTF-8."""
    path = os.fsdecode(bytes(tmp_path) + b"/caf\xe9 \xff.mp4")
    try:
        shutil.copy(CARPHONE, path)
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    return path


@pytest.mark.parametrize("out", ["-", "out.json"])
def test_file_names_that_are_no_utf8(capsys, tmp_path, monkeypatch, weights, strange, out):
    """Beside others, in JSON: nothing is lost, and the name can be told from it."""
    monkeypatch.chdir(tmp_path)
    argv = ["predict", CARPHONE, strange, strange + ".none", "--weights", weights, "--json", out]
    assert main([*argv, *SMALL, *ONE]) == 2  # for the last
    captured = capsys.readouterr()
    data = captured.out.encode() if out == "-" else Path(out).read_bytes()
    results = json.loads(data)["results"]  # UTF-8
    assert list(results) == [CARPHONE, strange]
    assert results[strange] == results[CARPHONE]
    assert os.fsencode(list(results)[1]).endswith(b"/caf\xe9 \xff.mp4")


@pytest.mark.parametrize("locale", [{}, {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}])
@pytest.mark.parametrize("json_out", [[], ["--json", "-"]])
def test_file_names_that_are_no_utf8_in_a_process(weights, strange, locale, json_out):
    argv = [sys.executable, "-m", "r3d_kernels", "predict", strange, "--weights", weights, *json_out]
    environment = {**os.environ, "PYTHONPATH": str(Path(predict.__file__).parents[2]), **locale}
    done = subprocess.run(
        [*argv, *SMALL, *ONE], env=environment, cwd=Path(strange).parent, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # A locale may have Python write the bytes as they were.
    assert b"caf\\udce9 \\udcff.mp4" in done.stdout or (not json_out and os.fsencode(strange) in done.stdout)


def test_labels_that_no_encoding_has(capsys, tmp_path, weights):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(["\udcff", "\ud800", "\U0001f600", "a", "b", "c", "d"]))
    for out in (["--json", "-"], []):
        argv = ["predict", CARPHONE, "--weights", weights, "--labels", str(path), "--topk", "7", *out]
        assert main([*argv, *SMALL, *ONE]) == 0
        text = capsys.readouterr().out
        text.encode()
        assert "\\udcff" in text


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100_000, "9" * 10_000, '{"a": 1e999}', "NaN", '["a", null]']
)
def test_labels_of_any_json(tmp_path, text):
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(CliError, match=r"--labels .*labels\.json: ") as error:
        predict.read_labels(str(path))
    assert len(str(error.value)) < 300 + len(str(path))


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="the system has no endless device")
def test_labels_without_an_end():
    with pytest.raises(CliError, match="--labels /dev/zero: larger than"):
        predict.read_labels("/dev/zero")


def test_the_number_of_labels_is_checked_before_the_work(capsys, tmp_path, weights, monkeypatch):
    monkeypatch.setattr(predict, "score", lambda *_: pytest.fail("computed"))
    path = tmp_path / "labels.txt"
    path.write_text("one\ntwo\n")
    assert main(["predict", CARPHONE, "--weights", weights, "--labels", str(path)]) == 2
    assert "--labels has 2 names, the network has 7 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError,  # made in the test: its traceback holds the model
        lambda: RuntimeError("out of\nmemory"),
        lambda: OSError(5, "Input/output error"),
    ],
)
def test_one_video_that_fails_does_not_lose_the_others(capsys, weights, monkeypatch, tmp_path, error):
    second, score = str(tmp_path / "second.mp4"), predict.score
    shutil.copy(CARPHONE, second)

    def failing(model, clips, *rest):
        failing.calls += 1
        if failing.calls == 2:
            raise error()
        return score(model, clips, *rest)

    failing.calls = 0
    monkeypatch.setattr(predict, "score", failing)
    assert main(["predict", CARPHONE, second, "--weights", weights, "--json", "-", *SMALL, *ONE]) == 2
    captured = capsys.readouterr()
    assert list(json.loads(captured.out)["results"]) == [CARPHONE]
    assert f"error: {second}: " in captured.err
