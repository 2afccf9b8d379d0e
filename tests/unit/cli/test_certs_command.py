"""``shoal certs``: what it writes is what replicas read, and nothing that is there is lost by it."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest
from cryptography import x509
from token_streams import joined
from typer.testing import CliRunner, Result

from shoal.api.tls import server_credentials
from shoal.cli import app
from shoal.cluster.certificates import ROLES
from shoal.config import ShoalConfig, TlsConfig
from shoal.errors import ConfigError, ModelError
from shoal.wire.certificates import read_certificate


def certs(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["certs", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = certs(tmp_path / "certs")
    assert made.exit_code == 0, made.output
    return tmp_path / "certs"


def of_gateway(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "gateway" / "tls.crt").read_bytes())


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_processes_know_one_another_by_it(folder: Path):
    async with joined(tls=folder) as both:
        await both.running()


def test_every_role_has_what_it_needs_and_no_more(folder: Path):
    for role in ROLES:
        read_certificate(folder, role)
        assert {path.name for path in (folder / role).iterdir()} == {"ca.crt", "tls.crt", "tls.key"}
    assert {path.name for path in folder.iterdir()} == {"ca.crt", "ca.key", *ROLES}


def test_all_of_it_is_its_owners_alone(folder: Path):
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(folder)} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_dir()} == {0o700}


def test_what_is_there_is_replaced_by_force_alone_and_by_the_same_authority(folder: Path):
    before = files(folder)
    refused = certs(folder)
    assert isinstance(refused.exception, ConfigError) and "--force" in refused.exception.message
    assert files(folder) == before
    assert certs(folder, "--force").exit_code == 0
    after = files(folder)
    same = {path.relative_to(folder) for path in after if after[path] == before[path]}
    assert same == {Path("ca.crt"), Path("ca.key"), *(Path(role) / "ca.crt" for role in ROLES)}
    # Who has the old files and who has the new ones believe each other: replaced in turn, none is cut off.
    authority = x509.load_pem_x509_certificate(before[folder / "ca.crt"])
    of_gateway(folder).verify_directly_issued_by(authority)


@pytest.mark.parametrize("lost", ["ca.key", "ca.crt"])
def test_half_an_authority_is_refused(folder: Path, lost: str):
    (folder / lost).unlink()
    refused = certs(folder, "--force")
    assert isinstance(refused.exception, ConfigError) and f"bring {lost} back" in refused.exception.message


def test_the_gateways_will_do_for_its_clients_by_the_names_they_use(folder: Path):
    def names() -> set[str]:
        found = of_gateway(folder).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return {*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))}

    assert names() == {"gateway.shoal.internal", "localhost", "127.0.0.1", "::1"}
    assert certs(folder, "--force", "--host", "reef.example.com", "--host", "10.1.2.3").exit_code == 0
    assert names() == {"gateway.shoal.internal", "reef.example.com", "10.1.2.3"}
    home = folder / "gateway"
    assert server_credentials(TlsConfig(cert_file=home / "tls.crt", key_file=home / "tls.key")) is not None
    others = x509.load_pem_x509_certificate((folder / "decode" / "tls.crt").read_bytes())
    found = others.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert found.get_values_for_type(x509.DNSName) == ["decode.shoal.internal"]


def test_what_is_replaced_stays_as_long_and_for_whom_it_was(tmp_path: Path):
    assert certs(tmp_path / "certs", "--host", "reef.example.com", "--host", "10.1.2.3", "--days", 30).exit_code == 0
    before = of_gateway(tmp_path / "certs")
    again = certs(tmp_path / "certs", "--force")
    assert again.exit_code == 0 and "reef.example.com, 10.1.2.3" in " ".join(again.output.split())
    after = of_gateway(tmp_path / "certs")
    assert after.serial_number != before.serial_number
    names = x509.SubjectAlternativeName
    assert after.extensions.get_extension_for_class(names) == before.extensions.get_extension_for_class(names)
    lasts, lasted = (one.not_valid_after_utc - one.not_valid_before_utc for one in (after, before))
    assert lasts.days == lasted.days == 30


# --- shoal serve --tls ----------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ShoalConfig]:
    """What would have been served."""
    configs: list[ShoalConfig] = []
    monkeypatch.setattr("shoal.cluster.start.running", lambda config, *_args, **_kwargs: _Noted(config, configs))
    return configs


class _Noted:
    def __init__(self, config: ShoalConfig, configs: list[ShoalConfig]) -> None:
        configs.append(config)

    def __enter__(self) -> None:
        raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None: ...


def test_serve_takes_the_folder_wherever_replicas_run(
    folder: Path, served: list[ShoalConfig], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(folder.parent)
    assert CliRunner().invoke(app, ["serve", "--tls", folder.name]).exit_code == 0
    [config] = served
    assert config.tls is not None and config.tls != "off" and config.tls.folder == folder


def test_serve_takes_off_and_leaves_a_configuration_s_own_word_otherwise(
    folder: Path, tmp_path: Path, served: list[ShoalConfig]
):
    file = tmp_path / "shoal.yaml"
    file.write_text(f"tls: {{folder: {folder}}}\nhandoff: {{host: 0.0.0.0}}\n")
    assert CliRunner().invoke(app, ["serve", str(file)]).exit_code == 0
    assert CliRunner().invoke(app, ["serve", str(file), "--tls", "off"]).exit_code == 0
    assert [one.tls if one.tls in {None, "off"} else "a folder" for one in served] == ["a folder", "off"]


def test_roles_that_would_not_believe_one_another_are_told_before_anything_starts(
    folder: Path, tmp_path: Path, served: list[ShoalConfig]
):
    assert certs(tmp_path / "others").exit_code == 0
    shutil.rmtree(folder / "decode")
    shutil.copytree(tmp_path / "others" / "decode", folder / "decode")
    refused = CliRunner().invoke(app, ["serve", "--tls", str(folder)])
    assert isinstance(refused.exception, ConfigError) and "decode wouldn't believe gateway" in refused.exception.message
    # While an authority is replaced, both are believed.
    both = (folder / "gateway" / "ca.crt").read_bytes() + (folder / "decode" / "ca.crt").read_bytes()
    for role in ROLES:
        (folder / role / "ca.crt").write_bytes(both)
    assert CliRunner().invoke(app, ["serve", "--tls", str(folder)]).exit_code == 0
    assert len(served) == 1


def test_a_model_or_a_certificate_for_clients_that_is_not_there_is_told_before_anything_starts(
    tmp_path: Path, served: list[ShoalConfig]
):
    missing = CliRunner().invoke(app, ["serve", "--model", str(tmp_path / "nowhere")])
    assert isinstance(missing.exception, ModelError) and "there is no model" in missing.exception.message
    file = tmp_path / "shoal.yaml"
    file.write_text(f"gateway: {{tls: {{cert_file: {tmp_path}/no.crt, key_file: {tmp_path}/no.key}}}}\n")
    missing = CliRunner().invoke(app, ["serve", str(file)])
    assert isinstance(missing.exception, ConfigError) and "gateway.tls.cert_file" in missing.exception.message
    assert not served


def test_keys_are_read_where_the_gateway_is(tmp_path: Path, served: list[ShoalConfig]):
    file = tmp_path / "shoal.yaml"
    file.write_text(f"gateway: {{keys_file: {tmp_path}/no.yaml}}\n")
    missing = CliRunner().invoke(app, ["serve", str(file)])
    assert isinstance(missing.exception, ConfigError) and "no.yaml" in missing.exception.message
    assert not served
    file.write_text(f"gateway: {{keys_file: {tmp_path}/no.yaml, resource: gateway}}\nray: {{address: auto}}\n")
    assert CliRunner().invoke(app, ["serve", str(file)]).exit_code == 0
    assert len(served) == 1
    (tmp_path / "no.yaml").write_text("tenants: 3\n")  # it may be here all the same
    wrong = CliRunner().invoke(app, ["serve", str(file)])
    assert isinstance(wrong.exception, ConfigError) and "no.yaml" in wrong.exception.message
    assert len(served) == 1
