import pytest
import typer

from pointsman_cli.extras import needs_extra


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("torch", "learning"),
        ("sklearn.linear_model", "learning"),
        ("ray", "ray"),
        ("tokenizers", "embeddings"),
    ],
)
def test_the_extra_is_named(module, extra, capsys):
    with pytest.raises(typer.Exit) as left, needs_extra():
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    assert left.value.exit_code == 2
    wanted = f"error: needs the {extra} extra: pip install 'pointsman[{extra}]' (No module named"
    assert capsys.readouterr().err.startswith(wanted)


def test_a_module_of_our_own_is_a_bug():
    with pytest.raises(ModuleNotFoundError), needs_extra():
        raise ModuleNotFoundError("No module named", name="pointsman_core.gone")
