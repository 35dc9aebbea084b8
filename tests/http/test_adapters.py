"""Uploads that are taken, uploads that are refused, and what stays when the server does not."""

import io
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file

from tests.conftest import MakeAdapter
from tests.http.conftest import Running, reconfigure, serve, settings, upload

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def stored(running: Running) -> list[str]:
    return sorted(p.name for p in (running.serving.settings.home / "store" / "sealed").glob("*/*"))


def test_an_upload_is_taken_shown_listed_and_deleted(
    http: httpx.Client, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter(100)
    reply = upload(http, "team-a.fresh", folder, metadata='{"owner": "me"}', alias="prod")
    assert reply.status_code == 201, reply.text
    version = reply.json()
    assert (version["adapter"], version["version"], version["state"]) == (
        *("team-a.fresh", 1),
        "ready",
    )
    assert (version["rank"], version["alpha"], version["rslora"]) == (8, 16, False)

    again = upload(http, "team-a.fresh", folder)
    assert (again.status_code, again.json()["digest"]) == (200, version["digest"])

    shown = http.get("/v1/adapters/team-a.fresh").json()
    assert shown["aliases"] == {"latest": 1, "prod": 1}
    assert shown["metadata"] == {"owner": "me"}
    assert len(shown["versions"]) == 1

    second = upload(http, "team-a.fresh", make_adapter(101))
    assert (second.status_code, second.json()["version"]) == (201, 2)
    assert http.get("/v1/adapters/team-a.fresh").json()["aliases"] == {"latest": 2, "prod": 1}
    assert http.get("/v1/adapters/team-a.fresh/versions/prod").json()["version"] == 1
    assert http.delete("/v1/adapters/team-a.fresh/versions/1").status_code == 409

    names = [model["id"] for model in http.get("/v1/models").json()["data"]]
    assert "team-a.fresh" in names
    assert http.delete("/v1/adapters/team-a.fresh").status_code == 200
    assert http.get("/v1/adapters/team-a.fresh").status_code == 404
    assert http.delete("/v1/adapters/team-a.fresh").status_code == 404


def test_the_algebra_of_the_guide(http: httpx.Client, four: dict[str, str]) -> None:
    version = http.get("/v1/adapters/one").json()["versions"][0]
    total = version["algebra"]
    # Seven linears of 30 layers: r·(d_in + d_out) against d_in·d_out.
    dims = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    assert total["parameters"] == 30 * sum(8 * (i + o) for i, o in dims)
    assert total["delta_parameters"] == 30 * sum(i * o for i, o in dims)
    assert total["reduction"] == pytest.approx(
        1 - total["parameters"] / total["delta_parameters"], abs=1e-3
    )


def test_the_list_is_paged(http: httpx.Client, four: dict[str, str]) -> None:
    names: list[str] = []
    after = None
    while True:
        page = http.get("/v1/adapters", params={"limit": 2} | ({"after": after} if after else {}))
        assert page.json()["object"] == "list"
        names += [adapter["name"] for adapter in page.json()["data"]]
        if not page.json()["has_more"]:
            break
        after = page.json()["next"]
    assert names == sorted(names)
    assert set(four) <= set(names)
    only = http.get("/v1/adapters", params={"prefix": "thr"}).json()["data"]
    assert [adapter["name"] for adapter in only] == ["three"]
    assert http.get("/v1/adapters", params={"limit": 0}).status_code == 400


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.zst"])
def test_an_archive_is_the_same_adapter(
    http: httpx.Client, four: dict[str, str], make_adapter: MakeAdapter, kind: str
) -> None:
    folder, packed = make_adapter(1), io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(packed, "w") as file:
            for path in folder.iterdir():
                file.write(path, f"my adapter/{path.name}")
    else:
        with tarfile.open(fileobj=packed, mode="w:gz" if kind == "tar.gz" else "w") as tar:
            tar.add(folder, "my adapter")
    if kind == "tar.zst":
        packed = io.BytesIO(zstandard.compress(packed.getvalue()))
    reply = http.post(
        "/v1/adapters",
        data={"name": "one"},
        files={"archive": (f"a.{kind}", packed.getvalue())},
    )
    assert (reply.status_code, reply.json()["digest"]) == (200, four["one"])


Bend = Any


def _config(**changes: Any) -> Bend:
    return lambda folder: reconfigure(folder, **changes)


def _weights(change: Any) -> Bend:
    def bend(folder: Path) -> None:
        tensors = change(load_file(folder / WEIGHTS))
        save_file(tensors, folder / WEIGHTS)

    return bend


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _no_b(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in tensors.items() if "layers.3.self_attn.q_proj.lora_B" not in k}


def _nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    next(iter(tensors.values()))[0, 0] = float("nan")
    return tensors


def _shape(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: torch.zeros(8, 100) if "q_proj.lora_A" in k else v for k, v in tensors.items()}


def _elsewhere(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.replace("self_attn", "attention"): v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("bend", "code"),
    [
        (_pickle, "pickle_refused"),
        (lambda f: (f / CONFIG).unlink(), "config_missing"),
        (lambda f: (f / CONFIG).write_text("{not json"), None),
        (_config(peft_type="IA3"), None),
        (_config(use_dora=True), None),
        (_config(bias="all"), None),
        (_config(modules_to_save=["lm_head"]), None),
        (_config(r=16), None),
        (_weights(_no_b), None),
        (_weights(_nan), None),
        (_weights(_shape), None),
        (_weights(_elsewhere), None),
        (_cut, None),
        (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64), None),
    ],
)
def test_a_bad_adapter_is_refused_with_every_reason_and_leaves_nothing(
    running: Running,
    http: httpx.Client,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    bend: Bend,
    code: str | None,
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(make_adapter(1), folder)
    bend(folder)
    before = stored(running)
    files = [("files", (p.name, p.read_bytes())) for p in folder.iterdir() if p.name != "README.md"]
    reply = http.post("/v1/adapters", data={"name": "bad"}, files=files)
    assert reply.status_code == 422, reply.text
    error = reply.json()["error"]
    assert error["code"] == "invalid_adapter"
    assert error["problems"]
    for problem in error["problems"]:
        assert all(problem[key] for key in ("code", "where", "message", "fix"))
    if code:
        assert code in {problem["code"] for problem in error["problems"]}
    assert http.get("/v1/adapters/bad").status_code == 404
    assert stored(running) == before


def test_several_things_wrong_are_named_at_once(
    http: httpx.Client, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(make_adapter(1), folder)
    _config(use_dora=True, bias="all", r=128)(folder)
    _weights(_no_b)(folder)
    problems = upload(http, "bad", folder).json()["error"]["problems"]
    assert len({problem["code"] for problem in problems}) >= 4


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("base", "reserved_name"),
        ("smollm2-135m-instruct", "reserved_name"),
        ("Big", "invalid_name"),
        ("a/b", "invalid_name"),
        ("a..b", "invalid_name"),
        ("x" * 129, "invalid_name"),
    ],
)
def test_names_that_cannot_be(
    http: httpx.Client, make_adapter: MakeAdapter, name: str, code: str
) -> None:
    reply = upload(http, name, make_adapter(1))
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, code)


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        ({"json": {"name": "x"}}, 400, "bad_request"),
        ({"data": {"name": "x"}, "files": {"other": b"1"}}, 400, "bad_request"),
        ({"data": {"name": "x", "metadata": "["}, "files": {"files": b"1"}}, 400, "bad_request"),
        ({"data": {"name": "x", "metadata": "[]"}, "files": {"files": b"1"}}, 400, "bad_request"),
        ({"files": {"files": b"1"}}, 400, "bad_request"),
        ({"data": {"name": "x"}, "files": {"archive": b"1", "files": b"2"}}, 400, "bad_request"),
        ({"data": {"name": "x"}, "files": {"archive": ("a.zip", b"PK??")}}, 422, None),
        ({"data": {"name": "x"}, "files": {"files": (CONFIG, bytes(2**20 + 1))}}, 413, None),
        ({"data": {"name": "x"}, "files": {"archive": ("a.tar", bytes(31 * 10**6))}}, 413, None),
        (
            {"content": b"--b\r\nbroken", "headers": {"content-type": "multipart/form-data"}},
            400,
            "bad_request",
        ),
        (
            {
                "content": b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nx',
                "headers": {"content-type": "multipart/form-data; boundary=b"},
            },
            400,
            "bad_request",
        ),
    ],
)
def test_forms_that_cannot_be(
    running: Running, http: httpx.Client, sent: Any, status: int, code: str | None
) -> None:
    before = stored(running)
    reply = http.post("/v1/adapters", **sent)
    assert reply.status_code == status, reply.text
    assert code is None or reply.json()["error"]["code"] == code
    assert reply.json()["error"]["message"]
    assert stored(running) == before


def test_the_limit_holds_for_a_client_that_announces_no_length(http: httpx.Client) -> None:
    def endless() -> Any:
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="f"\r\n\r\n'
        for _ in range(40):
            yield bytes(10**6)

    reply = http.post(
        "/v1/adapters",
        content=endless(),
        headers={"content-type": "multipart/form-data; boundary=b"},
    )
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")


def test_a_file_name_cannot_lead_out_of_the_store(
    running: Running, http: httpx.Client, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter(1)
    files = [("files", (f"../../{p.name}", p.read_bytes())) for p in folder.iterdir()]
    assert http.post("/v1/adapters", data={"name": "one"}, files=files).status_code in (200, 201)
    home = running.serving.settings.home
    assert not list(home.glob("*.safetensors")) + list(home.parent.glob("*.safetensors"))


def test_a_restart_serves_what_was_served_before(
    home: Path, base_folder: Path, make_adapter: MakeAdapter
) -> None:
    first = serve(settings(home), base_folder)
    with httpx.Client(base_url=next(first).url, timeout=30) as client:
        kept = upload(client, "kept", make_adapter(1), alias="prod").json()
        upload(client, "dropped", make_adapter(2))
        client.delete("/v1/adapters/dropped")
    first.close()
    second = serve(settings(home), base_folder)
    with httpx.Client(base_url=next(second).url, timeout=30) as client:
        names = [adapter["name"] for adapter in client.get("/v1/adapters").json()["data"]]
        assert names == ["kept"]
        assert client.get("/v1/adapters/kept/versions/prod").json()["digest"] == kept["digest"]
        asked = {"prompt": "Hi", "model": "kept@prod", "max_tokens": 4}
        assert client.post("/v1/completions", json=asked).status_code == 200
        # A name that comes back goes on counting: no version number ever means other bytes.
        assert upload(client, "dropped", make_adapter(3)).json()["version"] == 2
    second.close()
