"""tools/studio.py without a browser: what its page may do, and what is refused."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from typing import Optional
from urllib.parse import quote, unquote

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import UserError
from ldm.settings.generate import GenerateSettings
from ldm.settings.values import Setting, settings_of
from tests.conftest import ROOT

pytest.importorskip("starlette", reason="the extra `studio` is not installed")

from tools import studio as tool  # noqa: E402
from tools.studio_page.fields import SERVER_GROUPS, _choices, _kind, describe, generate_fields, train_fields  # noqa: E402
from tools.studio_page.files import Folders, NotAllowed, check_links_below  # noqa: E402
from tools.studio_page.generation import Cancelled, Generator, Job  # noqa: E402
from tools.studio_page.guard import MAX_JSON, MAX_UPLOAD, Refused, check_origin, host_names  # noqa: E402
from tools.studio_page.server import PARTS, STATIC, make_app  # noqa: E402
from tools.studio_page.training import Recipe  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    """Folders of LoRAs, data, images and runs, and a secret beside them."""
    for name in ("loras/sub", "data/cats", "out/images/1/samples", "out/training/run/ckpt", "secret"):
        (tmp_path / name).mkdir(parents=True)
    for name in (
        "loras/a.safetensors", "loras/sub/b.ckpt", "loras/.hidden.safetensors", "loras/notes.txt", "secret/key.png",
        "secret/key.safetensors", "out/training/run/ckpt/lora.ckpt", "out/training/run/ckpt/state-00000004.safetensors",
        "out/training/run/train.yaml", "out/training/run/report.html",
    ):  # fmt: skip
        (tmp_path / name).write_text("x")
    os.symlink(tmp_path / "secret" / "key.safetensors", tmp_path / "loras" / "link.safetensors")
    os.symlink(tmp_path / "secret", tmp_path / "loras" / "door")
    os.symlink(tmp_path / "secret", tmp_path / "data" / "door")
    os.symlink(tmp_path / "secret" / "key.png", tmp_path / "out" / "images" / "1" / "samples" / "link.png")
    os.symlink(tmp_path / "loras" / "a.safetensors", tmp_path / "loras" / "again.safetensors")
    for name in ("out/images/1/samples/00000.png", "out/training/run/sample.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def folders(folder):
    roots = {"loras": "loras", "data": "data", "images": "out/images", "runs": "out/training"}
    return Folders({word: folder / path for word, path in roots.items()})


# ---- names of files --------------------------------------------------------------------------------------------------

ESCAPES = [
    "", "/", "loras/", "loras//a.safetensors", "/etc/passwd", "etc/passwd", "../secret/key.png",
    "loras/../secret/key.png",
    "loras/sub/../../secret/key.png", "loras/./a.safetensors", "loras/..", "loras/link.safetensors",
    "loras/door/key.safetensors", "loras/door", "loras/.hidden.safetensors", "loras/..\\..\\secret\\key.png",
    "loras/a.safetensors\0", "loras/\n", "loras/$HOME", "loras/${HOME}/x", "~", "loras/~root/x", "file:///etc/passwd",
    "loras/missing", "loras/a.safetensors/x", "LORAS/a.safetensors", "x" * 2000, "loras/" + "a" * 990, None, 3, True,
    ["loras/a.safetensors"], {"name": "loras/a.safetensors"}, "loras/\u202ea", "loras/%2e%2e/secret", "\udcff",
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES, ids=lambda name: repr(name)[:40])
def test_a_name_that_leads_out_of_the_folders_is_refused(folders, name):
    with pytest.raises(NotAllowed):
        folders.resolve(name)


def test_a_name_below_a_folder_is_found(folders, folder):
    assert folders.resolve("loras/a.safetensors") == (folder / "loras" / "a.safetensors").resolve()
    assert folders.resolve("loras/sub/b.ckpt", "loras", "data").name == "b.ckpt"
    assert folders.resolve("loras/again.safetensors").name == "a.safetensors"  # a link that stays inside
    assert folders.name_of(folders.resolve("loras/sub/b.ckpt")) == "loras/sub/b.ckpt"
    assert folders.name_of(folder / "secret" / "key.png") is None
    with pytest.raises(NotAllowed, match="in none of the folders"):
        folders.resolve("loras/a.safetensors", "data")


def test_a_path_has_the_name_of_the_innermost_folder(folder):
    folders = Folders({"loras": folder, "images": folder / "out" / "images", "data": folder / "out"})
    assert folders.name_of((folder / "out" / "images" / "1").resolve()) == "images/1"
    assert folders.name_of((folder / "loras").resolve()) == "loras/loras"


def test_a_name_that_settings_would_expand_is_refused(folders, folder):
    (folder / "loras" / "$HOME.safetensors").write_text("x")
    with pytest.raises(NotAllowed, match="a dollar: rename the file"):
        folders.resolve("loras/$HOME.safetensors")


def test_lists_hold_no_hidden_name_and_enter_no_link(folders):
    listed = {f"{place}/{file}" for place, _, files in folders.walk("loras") for file in files}
    assert "loras/sub/b.ckpt" in listed and not any("hidden" in name or "door" in name for name in listed)


def test_a_data_set_with_a_link_out_of_its_root_is_refused(folder):
    check_links_below(folder / "data" / "cats", folder / "data")
    os.symlink(folder / "secret" / "key.png", folder / "data" / "cats" / "cat.png")
    with pytest.raises(NotAllowed, match=r"cat\.png is a link out of .*data: copy"):
        check_links_below(folder / "data" / "cats", folder / "data")


# ---- who may ask -----------------------------------------------------------------------------------------------------

HOSTS = host_names("127.0.0.1", 7861)


@pytest.mark.parametrize("host", ["127.0.0.1:7861", "localhost:7861", "[::1]:7861", "LOCALHOST:7861"])
def test_the_machine_itself_may_ask(host):
    check_origin("GET", {"host": host}, HOSTS)
    check_origin("POST", {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}, HOSTS)


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:7861", "127.0.0.1", "127.0.0.1:80", "localhost", "localhost.evil.example:7861",
     "127.0.0.1:7861.evil.example", "0.0.0.0:7861", "192.168.1.2:7861", "127.0.0.1:7861@evil.example", "127.1:7861"],
)  # fmt: skip
def test_another_host_is_refused(host):
    with pytest.raises(Refused, match="is not served as"):
        check_origin("GET", {"host": host}, HOSTS)


def test_another_host_may_ask_if_it_is_named():
    check_origin("GET", {"host": "studio.lan:7861"}, host_names("0.0.0.0", 7861, ["studio.lan"]))
    check_origin("GET", {"host": "localhost:9000"}, host_names("127.0.0.1", 7861, ["localhost:9000"]))
    check_origin("GET", {"host": "192.168.1.2:7861"}, host_names("192.168.1.2", 7861))
    check_origin("GET", {"host": "[fe80::1]:7861"}, host_names("fe80::1", 7861))
    check_origin("GET", {"host": "localhost"}, host_names("127.0.0.1", 80))
    with pytest.raises(Refused):
        check_origin("GET", {"host": "0.0.0.0:7861"}, host_names("0.0.0.0", 7861, ["studio.lan"]))


@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://evil.example"}, {"origin": "null"}, {"origin": ""}, {"origin": "http://localhost:7862"},
     {"origin": "https://localhost:7861"}, {"origin": "http://127.0.0.1:7861"}, {"sec-fetch-site": "cross-site"},
     {"sec-fetch-site": "same-site"}, {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}],
    ids=str,
)  # fmt: skip
def test_the_page_of_another_site_may_not_ask(headers):
    with pytest.raises(Refused, match="another site"):
        check_origin("POST", {"host": "localhost:7861", **headers}, HOSTS)


def test_a_link_from_another_site_may_lead_to_the_page_and_its_images_may_not_be_shown_there():
    check_origin("GET", {"host": "localhost:7861", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, HOSTS)
    with pytest.raises(Refused):
        check_origin(
            "GET", {"host": "localhost:7861", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, HOSTS
        )


# ---- the server ------------------------------------------------------------------------------------------------------


def fake_images(settings, open_model):
    """Write what was asked for as the name of a file, instead of an image. Some prompts fail."""
    if settings.prompt == "fails":
        raise UserError("there is no such thing")
    if settings.prompt == "breaks":
        raise ZeroDivisionError
    (tool.Path(settings.output_path) / "samples").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tool.Path(settings.output_path) / "samples" / "00000.png")


@pytest.fixture
def studio(folder):
    settings = tool.Settings(
        output_path=folder / "out",
        lora_dir=[str(folder / "loras")],
        data_root=[str(folder / "data")],
        device_target="CPU",
    )
    studio = tool.open_studio(settings)
    studio.generator = Generator(folder / "out" / "images", fake_images)
    return studio


@pytest.fixture
def ask(studio):
    """Sends a request to the application, as a server does, and returns status and answer."""
    app = make_app(studio, HOSTS)

    def send(method, path, body=None, kind="application/json", host="localhost:7861", **headers):
        raw = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        headers = {"host": host, **({} if raw is None else {"content-type": kind}), **headers}
        address, _, query = path.partition("?")
        scope = {
            "type": "http", "method": method, "path": unquote(address), "raw_path": address.encode(), "root_path": "",
            "query_string": query.encode(), "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 7861),
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        parts = [raw or b""] if raw is None or len(raw) < 5000 else [raw[:5000], raw[5000:]]
        requests = [{"type": "http.request", "body": p, "more_body": p is not parts[-1]} for p in parts]
        answers = []

        async def receive():
            return requests.pop(0) if requests else await asyncio.Event().wait()  # the client stays

        async def take(message):
            answers.append(message)

        asyncio.run(app(scope, receive, take))
        send.headers = {name.decode(): value.decode() for name, value in answers[0]["headers"]}
        content = b"".join(message.get("body", b"") for message in answers[1:])
        is_json = send.headers["content-type"] == "application/json"
        return answers[0]["status"], json.loads(content) if is_json else content

    yield send
    assert send("GET", "/api/jobs")[0] == 200  # it still answers


def finished(ask):
    """Wait for the queue, and return the newest request."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        newest = ask("GET", "/api/jobs")[1][0]
        if newest["state"] not in ("waiting", "loading", "sampling"):
            return newest
        time.sleep(0.02)
    raise AssertionError("it does not end")


def test_the_page_and_its_parts_are_served_with_a_strict_policy(ask):
    for path in ("/", *(f"/static/{name}" for name in PARTS)):
        status, content = ask("GET", path)
        assert status == 200 and content
        policy = ask.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'") and "unsafe" not in policy and "http" not in policy
        assert ask.headers["x-content-type-options"] == "nosniff" and ask.headers["x-frame-options"] == "DENY"
    assert ask("GET", "/static/server.py")[0] == 404 and ask("GET", "/static/..%2fserver.py")[0] == 404


@pytest.mark.parametrize("name", ["index.html", *PARTS])
def test_the_parts_of_the_page_name_no_address_and_read_no_text_as_html(name):
    text = (STATIC / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    for word in ("http:", "https:", "//cdn", "innerHTML", "eval(", "@import", "url(", "onclick=", "style=", "<script>"):
        assert word not in text, word


def test_the_options_list_what_there_is_and_nothing_else(ask):
    options = ask("GET", "/api/options")[1]
    assert options["loras"] == [
        "loras/a.safetensors", "loras/again.safetensors", "loras/sub/b.ckpt",
        "runs/run/ckpt/lora.ckpt",
    ]  # fmt: skip
    assert options["data"] == ["data/cats"] and "nano" in options["model"] and options["image_size"] == 64
    recipes = {recipe["name"]: recipe["values"] for recipe in options["recipes"]}
    assert recipes["lora_nano"]["max_steps"] == 500 and "lora_v1" not in recipes and "lora_mnist" not in recipes


def test_every_setting_of_the_page_is_declared_and_none_is_a_path():
    declared = settings_of(GenerateSettings)
    for name, setting in generate_fields().items():
        assert declared[name] is setting and not setting.rules["path"] and setting.rules["help"]
    described = {field["name"]: field for field in describe(GenerateSettings, generate_fields())}
    assert described["sampling_steps"]["kind"] == "integer" and described["sampling_steps"]["low"] == 1
    assert described["scale"]["optional"] and described["prompt"]["kind"] == "text"
    assert not {field["group"] for field in described.values()} & set(SERVER_GROUPS)
    assert described["scale"]["group"] == "sampling"
    assert described["first_index"]["kind"] == "integer"  # with the seed it says which image it is
    flag = Setting("tiles", None, Optional[bool], dict.fromkeys(settings_of(GenerateSettings)["scale"].rules))
    assert _kind(flag) == "choice" and _choices(flag) == [True, False]
    assert {"ckpt_path", "output_path", "device_target", "lora_ckpt_path", "data_path"}.isdisjoint(described)
    assert "data_path" not in train_fields()


def test_images_are_made_listed_and_shown(ask):
    status, job = ask("POST", "/api/jobs", {"settings": {"prompt": "a cat"}, "loras": []})
    assert status == 200 and job["number"] == 1
    done = finished(ask)
    assert done["state"] == "saved" and len(done["images"]) == 1
    gallery = ask("GET", "/api/gallery")[1]
    assert gallery["images"][0] == done["images"][0] and not gallery["more"]
    assert ask("GET", f"/files/{done['images'][0]}")[1][:4] == b"\x89PNG"
    assert ask("GET", f"/api/image?name={done['images'][0]}")[1]["size"] == [8, 8]


def test_a_request_has_its_images_before_it_says_that_it_has_ended(ask, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Job, "folder", property(lambda job: seen.append(job.state) or tool.Path(job.settings.output_path))
    )
    ask("POST", "/api/jobs", {"settings": {"prompt": "a cat"}, "loras": []})
    assert len(finished(ask)["images"]) == 1
    assert "loading" in seen and "saved" not in seen  # its folder is read while the page still asks


def save_png(path, **texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = PngInfo()
    for key, text in texts.items():
        fields.add_itxt(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=fields)


def test_the_newest_images_are_listed_whatever_their_number(ask, folder, monkeypatch):
    monkeypatch.setattr("tools.studio_page.files.MAX_LISTED", 2)
    monkeypatch.setattr("tools.studio_page.gallery.AT_ONCE", 3)
    for name in ("2/samples/0.png", "2/samples/1.png", "3/samples/0.png", "3/samples/1.png", "3/notes/2.png"):
        save_png(folder / "out" / "images" / name)
    os.symlink(folder / "out" / "images" / "3" / "samples", folder / "out" / "images" / "1" / "samples" / "door")
    (folder / "out" / "images" / "4").mkdir()  # a request that failed
    first = ask("GET", "/api/gallery")[1]
    assert first == {"images": [f"images/{name}.png" for name in ("3/samples/0", "3/samples/1", "2/samples/0")],
                     "more": True}  # fmt: skip
    second = {"images": ["images/2/samples/1.png", "images/1/samples/00000.png"], "more": False}
    assert ask("GET", f"/api/gallery?before={first['images'][-1]}")[1] == second
    (folder / "out" / first["images"][-1]).unlink()  # the place is known all the same
    assert ask("GET", f"/api/gallery?before={first['images'][-1]}")[1] == second
    assert ask("GET", f"/api/gallery?before={second['images'][-1]}")[1] == {"images": [], "more": False}


def test_texts_of_an_image_that_no_json_holds_are_shown_as_texts(ask, folder, monkeypatch):
    texts = {
        "settings": '{"scale": NaN}', "lora": '["\\ud800"]', "a": "[1e999]", "b": "[" * 900 + "]" * 900, "c": "{",
        "d": '{"x": 1}', "prompt": "[a]",
    }  # fmt: skip
    save_png(folder / "out" / "images" / "2" / "samples" / "0.png", **texts)
    status, answer = ask("GET", "/api/image?name=images/2/samples/0.png")
    assert status == 200 and answer["size"] == [8, 8] and answer["fields"]["d"] == {"x": 1}
    assert {key: answer["fields"][key] for key in texts if key not in "bd"} == {
        key: text for key, text in texts.items() if key not in "bd"
    }
    monkeypatch.setattr("ldm.generation.image_text.MAX_CHARACTERS", 100)
    status, answer = ask("GET", "/api/image?name=images/2/samples/0.png")
    assert status == 400 and "texts of more than 100 characters" in answer["error"]
    (folder / "out" / "images" / "2" / "samples" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    status, answer = ask("GET", "/api/image?name=images/2/samples/0.png")
    assert status == 400 and "cannot be read as an image" in answer["error"]


def test_a_file_whose_name_no_json_holds_is_not_listed(ask, folder):
    os.close(os.open(os.fsencode(folder / "loras") + b"/\xff.safetensors", os.O_CREAT | os.O_WRONLY))
    assert ask("GET", "/api/loras")[1][0] == "loras/a.safetensors"


def test_a_prompt_names_loras_of_the_folders_of_the_page(ask, studio, folder):
    (folder / "more").mkdir()
    (folder / "more" / "c.safetensors").write_text("x")
    studio.folders.roots["loras2"] = folder / "more"

    def made(prompt, syntax="a1111"):
        status, answer = ask("POST", "/api/jobs", {"settings": {"prompt": prompt, "prompt_syntax": syntax}})
        assert status == 200, answer
        return studio.generator.jobs[answer["number"]].settings.lora_dir

    assert made("a cat <lora:a:0.5>") == str((folder / "loras").resolve())
    assert made("a cat <lora:c>") == str(folder / "more")
    assert made("a cat") is None and made("a cat <lora:a>", "plain") is None
    for tag, reason in (("<lora:missing>", "has no LoRA of this name"), ("<lora:a:x>", "is not a number")):
        status, answer = ask("POST", "/api/jobs", {"settings": {"prompt": tag, "prompt_syntax": "a1111"}})
        assert status == 400 and reason in answer["error"]
    del studio.folders.roots["loras"], studio.folders.roots["loras2"]
    status, answer = ask("POST", "/api/jobs", {"settings": {"prompt": "<lora:a>", "prompt_syntax": "a1111"}})
    assert status == 400 and "give the folder of your LoRA files" in answer["error"]


def test_a_request_for_too_many_images_is_refused_before_they_are_planned(ask, monkeypatch):
    monkeypatch.setattr("tools.studio_page.generation.plan_generation", lambda settings: 1 / 0)
    for settings in ({"n_samples": 257}, {"n_iter": 129, "n_samples": 2}):
        status, answer = ask("POST", "/api/jobs", {"settings": {"prompt": "a", **settings}})
        assert status == 400 and "at most 256 images" in answer["error"]


def test_a_request_that_fails_says_why_and_the_next_one_is_made(ask):
    for prompt, reason in (
        ("fails", "there is no such thing"),
        ("breaks", "a fault of the program (ZeroDivisionError)"),
    ):
        ask("POST", "/api/jobs", {"settings": {"prompt": prompt}})
        done = finished(ask)
        assert done["state"] == "failed" and done["error"].startswith(reason) and not done["images"]
    ask("POST", "/api/jobs", {"settings": {"prompt": "a cat"}})
    assert finished(ask)["state"] == "saved"


WRONG_JOBS = [
    ({"settings": {"prompt": "a"}, "lora": []}, '"lora" is unknown'),
    ({"settings": {"prompt": ""}}, "nothing to generate"),
    ({"settings": {"prompt": "a", "steps": 3}}, '"steps" is no setting of this page'),
    ({"settings": {"prompt": "a", "output_path": "/tmp"}}, '"output_path" is no setting of this page'),
    ({"settings": {"prompt": "a", "data_path": "/etc/passwd"}}, '"data_path" is no setting'),
    ({"settings": {"prompt": "a", "ckpt_path": "/etc/passwd"}}, '"ckpt_path" is no setting'),
    ({"settings": {"prompt": "a", "save_latents": "/tmp/x.npy"}}, '"save_latents" is no setting'),
    ({"settings": {"prompt": "a", "sampling_steps": 0}}, "sampling_steps: 0 is not allowed"),
    ({"settings": {"prompt": "a", "sampling_steps": "3"}}, "sampling_steps"),
    ({"settings": {"prompt": "a", "H": 65}}, "multiples of 16"),
    ({"settings": {"prompt": "a", "n_samples": 1000}}, "at most 256 images"),
    ({"settings": {"prompt": "a", "scale": float("nan")}}, "scale"),
    ({"settings": {"prompt": ["a"]}}, "prompt"),
    ({"settings": []}, "must hold lines"),
    ({"settings": {"prompt": "a"}, "loras": "loras/a.safetensors"}, "loras is no list"),
    ({"settings": {"prompt": "a"}, "loras": [{}] * 9}, "at most 8"),
    ({"settings": {"prompt": "a"}, "loras": ["loras/a.safetensors"]}, "a LoRA is a name and a strength"),
    ({"settings": {"prompt": "a"}, "loras": [{"name": "loras/a.safetensors", "path": "/"}]}, "a name and a strength"),
    ({"settings": {"prompt": "a"}, "loras": [{"name": "loras/a.safetensors", "strength": "1"}]}, "a number from"),
    ({"settings": {"prompt": "a"}, "loras": [{"name": "loras/a.safetensors", "strength": 1e9}]}, "a number from"),
    ({"settings": {"prompt": "a"}, "loras": [{"name": "loras/link.safetensors"}]}, "is a link out of its folder"),
    ({"settings": {"prompt": "a"}, "loras": [{"name": "/etc/passwd"}]}, "in none of the folders"),
    ({"settings": {"prompt": "a"}, "loras": [{"name": "images/1/samples/00000.png"}]}, "in none of the folders"),
]


@pytest.mark.parametrize(("content", "reason"), WRONG_JOBS, ids=[reason for _, reason in WRONG_JOBS])
def test_a_wrong_request_for_images_is_answered_with_its_reason(ask, content, reason):
    status, answer = ask("POST", "/api/jobs", content)
    assert status in (400, 404) and reason in answer["error"], answer
    assert ask("GET", "/api/jobs")[1] == []


WRONG_BODIES = [
    (b"", 400), (b"{", 400), (b"[]", 400), (b"3", 400), (b'"x"', 400), (b"null", 400), (b"\xff\xfe", 400),
    (b'{"settings": {}, "settings": {}}', 400), (b"[" * 100_000, 400), (b'{"a": ' + b"9" * 5000 + b"}", 400),
    (b'{"settings": {"prompt": "' + b"a" * MAX_JSON + b'"}}', 413),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status"), WRONG_BODIES, ids=[repr(body[:20]) for body, _ in WRONG_BODIES])
def test_a_broken_request_is_answered_with_an_error(ask, body, status):
    for path in ("/api/jobs", "/api/runs"):
        answer = ask("POST", path, body)
        assert answer[0] == status and answer[1]["error"]


def test_a_form_and_a_foreign_page_change_nothing(ask, folder):
    body = {"settings": {"prompt": "a"}}
    assert ask("POST", "/api/jobs", body, kind="text/plain")[0] == 415
    assert ask("POST", "/api/jobs", body, kind="application/x-www-form-urlencoded")[0] == 415
    for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}, {"sec_fetch_site": "cross-site"}):
        status, answer = ask("POST", "/api/jobs", body, **headers)
        assert status == 403 and answer["error"] and "content-security-policy" in ask.headers
    assert ask("GET", "/api/jobs")[1] == []


@pytest.mark.parametrize(("method", "path"), [
    ("GET", "/nothing"), ("DELETE", "/api/jobs"), ("PUT", "/"), ("GET", "/api/jobs/1/cancel"), ("POST", "/"),
    ("GET", "/api/runs/missing"), ("GET", "/api/runs/..%2f..%2fsecret"), ("GET", "/api/image"),
    ("GET", "/api/image?name=runs/run/sample.png"), ("GET", "/api/image?name=images/1/samples/link.png"),
])  # fmt: skip
def test_an_unknown_address_is_an_error(ask, method, path):
    status, answer = ask(method, path)
    assert 400 <= status < 500 and answer["error"]


@pytest.mark.parametrize("name", [
    "secret/key.png", "images/../../secret/key.png", "images/1/samples/link.png", "images/1/samples", "images/1",
    "images",
    "loras/a.safetensors", "data/cats", "runs/run/train.yaml", "runs/run/../run/train.yaml", "/etc/passwd",
    "images//etc/passwd", "images/%00", "images/$HOME", "images/1/samples/00000.png/", "runs/run/ckpt/report.html",
])  # fmt: skip
def test_no_other_file_is_read(ask, name):
    for address in (f"/files/{name}", f"/files/{quote(name, safe='')}"):
        status, answer = ask("GET", address)
        assert status == 404 and answer["error"], address


def test_a_report_is_shown_in_a_sandbox_and_a_lora_is_a_download(ask):
    assert ask("GET", "/files/runs/run/report.html")[0] == 200
    assert ask.headers["content-security-policy"].startswith("sandbox allow-scripts; default-src 'none'")
    assert ask("GET", "/files/runs/run/ckpt/lora.ckpt")[0] == 200
    assert (
        ask.headers["content-type"] == "application/octet-stream" and "attachment" in ask.headers["content-disposition"]
    )


def test_a_fault_of_the_program_is_an_answer_too(ask, studio, monkeypatch):
    monkeypatch.setattr(studio, "loras", lambda: {}["x"])
    assert ask("GET", "/api/loras") == (
        500, {"error": "a fault of the program (KeyError): the terminal shows where"}
    )  # fmt: skip
    monkeypatch.setattr(studio, "loras", lambda: [float("nan")])  # which no JSON holds
    assert ask("GET", "/api/loras")[1]["error"].startswith("a fault of the program (ValueError)")
    monkeypatch.setattr(studio, "loras", lambda: open("/nowhere/x"))
    status, answer = ask("GET", "/api/loras")
    assert status == 500 and answer["error"].startswith("/nowhere/x cannot be used: No such file or directory")


def test_an_upload_is_decoded_and_written_as_its_pixels(ask, folder):
    kind = "application/octet-stream"
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[270] = "a secret place"
    Image.new("RGB", (16, 8), "red").save(buffer, "JPEG", exif=exif)
    status, answer = ask("POST", "/api/uploads", buffer.getvalue(), kind=kind)
    assert status == 200 and re.fullmatch(r"uploads/[0-9a-f]{24}\.png", answer["name"])
    assert ask("GET", f"/files/{answer['name']}")[1][:4] == b"\x89PNG"
    written = folder / "out" / answer["name"]
    assert b"secret" not in written.read_bytes() and Image.open(written).size == (16, 8)
    for raw in (b"", b"no image", b"<svg/>", buffer.getvalue()[:200], b"\x89PNG\r\n\x1a\n" + b"x" * 60):
        status, answer = ask("POST", "/api/uploads", raw, kind=kind)
        assert status == 400 and "choose another file" in answer["error"], raw
    assert ask("POST", "/api/uploads", bytes(MAX_UPLOAD + 1), kind=kind)[0] == 413
    assert ask("POST", "/api/uploads", buffer.getvalue(), kind="image/jpeg")[0] == 415
    assert [path.name for path in (folder / "out" / "uploads").iterdir()] == [written.name]


# ---- the queue -------------------------------------------------------------------------------------------------------


def test_a_waiting_request_and_a_running_one_are_cancelled(tmp_path):
    begun, go_on = threading.Event(), threading.Event()

    def slow(settings, open_model):
        begun.set()
        for _ in range(3):  # the sampler's steps
            assert go_on.wait(20)
            generator._count_step()

    generator = Generator(tmp_path, slow)
    first, second = (generator.add({"prompt": prompt, "sampling_steps": 3}) for prompt in "ab")
    assert begun.wait(20) and first.state == "loading" and first.total == 3
    generator.cancel(second.number)
    assert second.state == "cancelled"
    generator.cancel(first.number)
    go_on.set()
    deadline = time.monotonic() + 20
    while not first.has_ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (first.state, first.step, second.step) == ("cancelled", 1, 0)
    assert first.folder != second.folder and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="no request 7"):
        generator.cancel(7)


def test_the_model_is_kept_until_another_one_is_asked_for(tmp_path):
    class Model:
        forgotten = 0

        def unload_embedding(self):
            self.forgotten += 1

        @classmethod
        def from_checkpoint(cls, checkpoint, **options):
            opened.append(checkpoint)
            return cls()

    opened = []
    generator = Generator(tmp_path, lambda settings, open_model: None)
    generator._class = lambda: Model
    checkpoints = [tmp_path / "a", tmp_path / "b"]
    for path in checkpoints:
        path.write_text("x")
    a, again, b = (
        generator._open_model(path, config=1, vae=None) for path in (checkpoints[0], checkpoints[0], checkpoints[1])
    )
    assert a is again is not b and opened == checkpoints and a.forgotten == 1
    checkpoints[1].write_text("other weights")
    assert generator._open_model(checkpoints[1], config=1, vae=None) is not b
    assert len(opened) == 3 and generator._open_model(checkpoints[1], config=2, vae=None) and len(opened) == 4


def test_the_steps_of_the_sampler_are_counted():
    from ldm.generation.pipeline import Pipeline

    generator = Generator(tool.Path("nowhere"))
    job = generator._current = Job(1, None, 3)
    pipeline = object.__new__(generator._class())
    called = []

    def sample(self, latents, callback=None):
        for step in (1, 2, 3):
            callback(step)
        return latents

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "sample", sample)
        assert pipeline.sample("latents", called.append) == "latents"
        assert (job.step, job.state, called) == (3, "sampling", [1, 2, 3])
        job.cancelled.set()
        with pytest.raises(Cancelled):
            pipeline.sample("latents", callback=called.append)
    assert len(called) == 3


# ---- trainings -------------------------------------------------------------------------------------------------------

WRONG_RUNS = [
    ({"name": "../x"}, "cannot be the name of a run"), ({"name": ""}, "cannot be the name"),
    ({"name": None}, "cannot be the name"),    ({"name": ".x"}, "cannot be the name"),
    ({"name": "a/b"}, "cannot be the name"), ({"name": "run"}, "already"),
    ({"name": "a" * 61}, "cannot be the name"), ({"recipe": "lora_v1"}, "is no recipe"),
    ({"recipe": 3}, "is no recipe"),    ({"recipe": "../../x"}, "is no recipe"),
    ({"data": "data/door"}, "is a link out"), ({"data": "/etc"}, "in none of"),
    ({"data": None}, "is no name"), ({"data": "loras/sub"}, "in none of"), ({"command": "rm"}, '"command" is unknown'),
    ({"settings": {"output_path": "/tmp"}}, '"output_path" is no setting'),
    ({"settings": {"max_steps": 0}}, "max_steps: 0 is not allowed"),
    ({"settings": {"sample_prompts": "/etc/passwd"}}, "must be a list"),
    ({"settings": {"sample_prompts": ["/etc/hosts.txt"]}}, "would be the path of a file"),
    ({"settings": {"sample_prompts": ["~/$HOME/a.JSON"]}}, "would be the path of a file"),
    ({"settings": {"sample_prompts": ["a cat", "my notes.toml"]}}, "would be the path of a file"),
    ({"settings": {"sample_every_n_steps": 4}}, "no effect without sample_prompts"),
    ({"settings": {"image_size": 65}}, "image_size 65 must be a multiple"), ({"settings": 3}, "must hold lines"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), WRONG_RUNS, ids=[f"{change}"[:50] for change, _ in WRONG_RUNS])
def test_a_wrong_training_is_not_started(ask, folder, change, reason):
    before = sorted(folder.rglob("*"))
    content = {"name": "new", "data": "data/cats", "recipe": "lora_nano", "settings": {}, **change}
    status, answer = ask("POST", "/api/runs", content)
    assert status in (400, 404) and reason in answer["error"], answer
    assert sorted(folder.rglob("*")) == before


def test_a_training_gets_its_recipe_and_the_values_of_the_page(ask, studio, folder, monkeypatch):
    commands = []

    class Process:
        returncode = None

        def __init__(self, command, **options):
            commands.append((command, options))

        def poll(self):
            return self.returncode

    monkeypatch.setattr("tools.studio_page.training.subprocess.Popen", Process)
    values = {"max_steps": 20, "lora_rank": 4, "ckpt_save_interval": 5}
    content = {"name": "new", "data": "data/cats", "recipe": "lora_nano", "settings": values}
    status, answer = ask("POST", "/api/runs", content)
    assert status == 200 and answer["state"] == "running" and answer["total"] == 20, answer
    command, options = commands[0]
    run = (folder / "out" / "training" / "new").resolve()
    assert command[1:] == [str(ROOT / "train_text_to_image.py"), "--train_config", str(run / "train.yaml")]
    assert options["cwd"] == run
    text = (run / "train.yaml").read_text()
    for line in ("max_steps: 20", "lora_rank: 4", "step_mode: true", "ckpt_save_interval: 5", "caption_dropout: 0.1"):
        assert line in text
    assert f"data_path: {(folder / 'data' / 'cats').resolve()}" in text
    status, answer = ask("POST", "/api/runs", {**content, "name": "other"})
    assert status == 400 and "new is being trained" in answer["error"]
    Process.returncode = 2
    (run / "console.txt").write_text("compiling\r10%\rerror: the folder is empty\n")
    (run / "metrics.csv").write_text(
        "step,loss,learning_rate,loss_scale,seconds,gradient_norm\n1,0.5,1,1,1,1\n2,nan,1,1,1,1"
    )
    details = ask("GET", "/api/runs/new")[1]
    assert details["state"] == "failed" and details["error"] == "the folder is empty" and not details["can_resume"]
    assert details["curve"] == {"step": [1, 2], "loss": [0.5, None], "mean": [0.5, 0.5]} and details["step"] == 2
    for action, reason in (("stop", "is not running"), ("resume", "no training state")):
        status, answer = ask("POST", f"/api/runs/new/{action}", {})
        assert status == 400 and reason in answer["error"]
    # Killed by the system it failed, killed by the page it is stopped. A resumed run keeps what was printed.
    (run / "ckpt").mkdir()
    (run / "ckpt" / "state-00000004.safetensors").write_text("x")
    studio.trainings._processes["new"].returncode = -9
    details = ask("GET", "/api/runs/new")[1]
    assert details["state"] == "failed" and details["error"].startswith("the system killed it")
    Process.returncode = None
    monkeypatch.setattr("tools.studio_page.training.subprocesses.terminate", lambda process: None)
    assert ask("POST", "/api/runs/new/resume", {})[1]["state"] == "running"
    assert (run / "console.txt").read_text().endswith("error: the folder is empty\n\n--- resumed ---\n")
    assert ask("POST", "/api/runs/new/stop", {})[0] == 200
    studio.trainings._processes["new"].returncode = -9
    details = ask("GET", "/api/runs/new")[1]
    assert details["state"] == "stopped" and details["error"] == "" and details["can_resume"]
    ask("POST", "/api/runs/new/resume", {})
    studio.trainings._processes["new"].returncode = 1
    details = ask("GET", "/api/runs/new")[1]
    assert details["state"] == "failed" and details["error"] == "it ended without a message"


def test_a_data_set_that_leads_out_of_its_folder_is_not_trained(ask, folder):
    os.symlink(folder / "secret" / "key.png", folder / "data" / "cats" / "cat.png")
    status, answer = ask("POST", "/api/runs", {"name": "new", "data": "data/cats", "recipe": "lora_nano"})
    assert status == 404 and "is a link out of" in answer["error"]


def test_checkpoints_are_counted_in_steps_whatever_the_recipe_says(studio, folder):
    recipe = folder / "recipe.yaml"
    recipe.write_text("use_lora: True\nmodel_config: configs/nano.yaml\n")
    studio.trainings.recipes["mine"] = Recipe("mine", recipe, {})
    for values, counted in (({"ckpt_save_interval": 5}, True), ({}, False)):
        settings = studio.trainings._settings(studio.trainings.recipes["mine"], folder / "run", folder / "data", values)
        assert settings.step_mode is counted


def test_a_run_of_an_earlier_page_can_be_resumed(ask, folder):
    (folder / "out" / "training" / "run" / "train.yaml").write_text("max_steps: 8\n")
    (run,) = ask("GET", "/api/runs")[1]
    assert run == {"name": "run", "state": "stopped", "step": 0, "total": 8, "can_resume": True, "error": ""}
    os.symlink(folder / "out" / "training" / "run", folder / "out" / "training" / "link")
    assert ask("GET", "/api/runs/link")[0] == 400


def test_settings_that_cannot_be_read_hide_no_other_run(ask, folder):
    other = folder / "out" / "training" / "broken"
    other.mkdir()
    (other / "train.yaml").write_text("a: [")
    runs = {run["name"]: run for run in ask("GET", "/api/runs")[1]}
    assert runs["run"]["error"] == "" and "train.yaml" in runs["broken"]["error"]
    assert runs["broken"]["total"] is None and not runs["broken"]["can_resume"]
    assert ask("GET", "/api/runs/broken")[0] == 200


@pytest.mark.parametrize("name", ["metrics.csv", "run.json", "ckpt", "samples", "train.yaml", "."])
def test_a_run_that_cannot_be_read_is_listed_with_its_error_beside_the_others(ask, folder, unprivileged, name):
    broken = folder / "out" / "training" / "broken"
    for part in ("ckpt", "samples"):
        (broken / part).mkdir(parents=True)
    for part in ("train.yaml", "metrics.csv", "run.json"):
        (broken / part).write_text("{}")
    (broken / name).chmod(0)
    status, answer = ask("GET", "/api/runs")
    runs = {run["name"]: run for run in answer}
    assert status == 200 and list(runs["broken"]) == list(runs["run"]) and runs["run"]["error"] == ""
    assert name in ("run.json", "samples") or re.search(rf"broken.*{re.escape(name)}", runs["broken"]["error"])
    status, details = ask("GET", "/api/runs/broken")
    (broken / name).chmod(0o700)
    assert status == (400 if name == "." else 200)
    if name == "samples":  # which the list does not read
        assert "broken/samples" in details["error"] and runs["broken"]["error"] == ""
    else:
        assert details["error"] == runs["broken"]["error"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", b"step,loss\n1,0.5\n\xff\0,\n2,0.25\n" + b"\0" * 4096),
        ("metrics.csv", b"\x89PNG\r\n"),
        ("metrics.csv", b"step,loss\n" + b"9" * 500 + b",1e999\n2,0.25\n"),
        ("train.yaml", b"max_steps: .nan\n"),
        ("train.yaml", b"max_steps: [1]\n"),
        ("run.json", b"[" * 5000),
        ("console.txt", b"\xff" * 9000),
    ],
)
def test_a_damaged_file_of_a_run_hides_no_other_run(ask, folder, name, content):
    broken = folder / "out" / "training" / "broken"
    broken.mkdir()
    (broken / "train.yaml").write_text("max_steps: 8\n")
    (broken / name).write_bytes(content)
    status, answer = ask("GET", "/api/runs")
    runs = {run["name"]: run for run in answer}
    assert status == 200 and set(runs) == {"run", "broken"} and runs["broken"]["total"] in (8, None)
    assert runs["broken"]["step"] == (2 if b"2,0.25" in content else 0)
    assert ask("GET", "/api/runs/broken")[0] == 200


# ---- the command -----------------------------------------------------------------------------------------------------


def test_without_the_library_the_command_says_how_to_install_it(tmp_path):
    (tmp_path / "starlette.py").write_text("raise ImportError('none', name='starlette')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "tools/studio.py", "--output_path", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 2 and run.stderr.startswith('error: the page needs starlette: pip install "starlette')
    assert run.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_what_cannot_be_served_is_an_error(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(UserError, match=r"cannot be listened on: Address already in use.*--port 0"):
            tool.listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="--data_root .*missing is no folder"):
        tool.open_studio(tool.Settings(output_path=tmp_path, data_root=[str(tmp_path / "missing")]))
