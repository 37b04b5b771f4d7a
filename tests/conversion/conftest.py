"""The conversion command, run in this process."""

import pytest
from safetensors.numpy import save_file

from jaxdg.conversion import convert as torch_to_flax

pytest.register_assert_rewrite("tests.conversion.checks")


@pytest.fixture
def command(tmp_path, capsys):
    """Runs the command on tensors (or on a file); returns exit code, stdout, stderr and the path of
    the output.
    """

    def run(source, *more, model="tiny", out="out.safetensors"):
        if isinstance(source, dict):
            save_file(source, tmp_path / "source.safetensors")
            source = tmp_path / "source.safetensors"
        named = () if model is None else ("--model", model)
        code = torch_to_flax.main(
            [*named, "--checkpoint", str(source), "--out", str(tmp_path / out), *more]
        )
        captured = capsys.readouterr()
        return code, captured.out, captured.err, tmp_path / out

    return run
