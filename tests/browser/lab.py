"""JupyterLab on a copy of the notebooks, and a headless Chromium that uses it as a person would: menus, keys and clicks."""
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import requests
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

ROOT = Path(__file__).parents[2]
BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells stay in the page, so that all their pictures can be looked at
}
FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run", "--no-proxy-server", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic", "--window-size=1280,1000", "--force-device-scale-factor=1")  # sandbox: CI is root; shm: a container's is small


def wait_until(condition, seconds: float, what: str, every: float = 0.25):
    "The first true value of condition(). TimeoutError after so many seconds."
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(every)
    return value


def stop(process: subprocess.Popen, seconds: float = 15):
    "Ask a process and what it started to end; after a while, insist."
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)  # it leads a session of its own
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


@contextmanager
def jupyter_lab(folder: Path):
    "A server on the first free port with a token of its own, whose notebooks, settings and run folders lie below `folder`. Yields its url and a requests.Session."
    for name in ("nbs", "recgen"):
        shutil.copytree(ROOT / name, folder / "work" / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
    shutil.copy(ROOT / "settings.ini", folder / "work")
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    token, runtime = secrets.token_hex(16), folder / "runtime"
    env = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "JUPYTER_PATH", "JUPYTERLAB_DIR")}  # a backend without a window would draw no picture
    env |= {"JUPYTER_TOKEN": token, "JUPYTER_RUNTIME_DIR": str(runtime), "JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_NO_CONFIG": "1", "IPYTHONDIR": str(folder / "ipython"),
            "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "JUPYTER_PREFER_ENV_PATH": "1",
            "PYTHONPATH": str(folder / "work"), "PYTHONDONTWRITEBYTECODE": "1", "RECGEN_RUNS": str(folder / "runs")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=200", f"--ServerApp.root_dir={folder / 'work'}"]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, cwd=folder / "work", env=env, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        def running():
            assert server.poll() is None, "JupyterLab did not start:\n" + (folder / "server.log").read_text()[-3000:]
            return next(runtime.glob("jpserver-*.json"), None)

        url = json.loads(wait_until(running, 90, "JupyterLab to start").read_text())["url"]  # it chose a port that was free
        session = requests.Session()
        session.trust_env = False
        session.headers["Authorization"] = f"token {token}"
        yield f"{url}doc/tree/nbs/{{}}.ipynb?reset&token={token}", url, session
    finally:
        stop(server)


@contextmanager
def chromium(folder: Path):
    "A headless browser with a profile of its own; it and its helpers are ended whatever happens."
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    service = Service(DRIVER, popen_kw={"start_new_session": True})
    driver = webdriver.Chrome(options, service)
    try:
        driver.set_script_timeout(60)
        yield driver
    finally:
        try:
            driver.quit()
        finally:
            stop(service.process, 5)


# What a reader sees of every code cell: its number, whether it runs, its errors, its pictures; and whether something has stopped him.
LOOK = """
const text = (node) => node ? node.innerText : '';
const cells = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')].map(cell => ({
  prompt: text(cell.querySelector('.jp-InputPrompt')).trim(),
  errors: [...cell.querySelectorAll('[data-mime-type="application/vnd.jupyter.error"]')].map(text).concat(
    [...cell.querySelectorAll('[data-mime-type="application/vnd.jupyter.stderr"]')].map(text).filter(t => t.includes('Traceback (most recent'))),
  images: [...cell.querySelectorAll('.jp-Cell-outputArea img')].map(i => i.complete ? i.naturalWidth : -1),
}));
return {cells, dialog: text(document.querySelector('.jp-Dialog-content')), status: (document.querySelector('.jp-Notebook-ExecutionIndicator') || {dataset: {}}).dataset.status};
"""


class Notebook:
    "One notebook, open in JupyterLab in a browser."

    def __init__(self, driver, lab, name: str, sources: list):
        page, self.server, self.session = lab
        self.driver, self.name, self.sources = driver, name, sources  # sources: of its code cells
        driver.get("about:blank")
        for kernel in self.session.get(f"{self.server}api/sessions").json():  # of the notebook before
            self.session.delete(f"{self.server}api/sessions/{kernel['id']}")
        driver.get(page.format(name))
        wait_until(self.ready, 90, f"{name} to open with a kernel")

    def ready(self) -> bool:
        "Whether all cells are there, and a kernel that listens to the page."
        state = self.look()
        if state["dialog"].startswith("Select Kernel"):  # JupyterLab asks where it is quicker than its own list of kernels
            self.find("//*[contains(@class, 'jp-Dialog')]//button[contains(@class, 'jp-mod-accept')]").click()
        kernels = [s["kernel"] for s in self.session.get(f"{self.server}api/sessions").json() if s["path"].endswith(f"{self.name}.ipynb")]
        return len(state["cells"]) == len(self.sources) and not state["dialog"] and any(k and k["execution_state"] == "idle" and k["connections"] for k in kernels)

    def look(self) -> dict:
        "The state of the page."
        return self.driver.execute_script(LOOK)

    def find(self, xpath: str):
        "The first element that is there and shown."
        return WebDriverWait(self.driver, 20).until(lambda d: next((e for e in d.find_elements(By.XPATH, xpath) if e.is_displayed()), None), f"nothing shows {xpath}")

    def run_all(self, seconds: float):
        "Run → Run All Cells, and wait for the last one. AssertionError with the cell's text for an error, or for a kernel that died."
        wait_until(self.begin, 60, f"{self.name} to begin", every=1)

        def done():
            state = self.look()
            for source, cell in zip(self.sources, state["cells"], strict=True):
                assert not cell["errors"], f"{self.name}: this cell shows an error\n\n{source}\n\n{cell['errors'][0]}"
            assert not state["dialog"], f"{self.name}: JupyterLab says\n{state['dialog']}\nwhile this cell ran\n\n{self.running(state)}"
            return all(c["prompt"].strip("[]:").isdigit() for c in state["cells"])

        try:
            wait_until(done, seconds, f"all cells of {self.name}", every=1)
        except TimeoutError as e:
            state = self.look()
            numbers = " ".join(c["prompt"] for c in state["cells"])
            raise AssertionError(f"{e}; the kernel is {state['status']}, the cells are {numbers}; not done:\n\n{self.running(state)}") from e

    def begin(self) -> bool:
        "Run → Run All Cells; whether a cell has taken notice."
        dialog = self.look()["dialog"]
        assert not dialog, f"{self.name}: JupyterLab says\n{dialog}"
        self.find("//*[contains(@class, 'lm-MenuBar-itemLabel')][text()='Run']").click()
        item = self.find("//li[@data-command='runmenu:run-all']")
        if "lm-mod-disabled" in item.get_attribute("class"):  # JupyterLab is still getting ready
            self.find("//body").send_keys(Keys.ESCAPE)
            return False
        item.click()
        try:
            return wait_until(lambda: any(c["prompt"] != "[ ]:" for c in self.look()["cells"]), 5, "the first cell")
        except TimeoutError:
            return False

    def running(self, state) -> str:
        "The text of the first cell that is not done."
        return next((source for source, cell in zip(self.sources, state["cells"], strict=True) if not cell["prompt"].strip("[]:").isdigit()), "none")

    def images(self) -> list:
        "Widths of the pictures of each code cell, once they are loaded."
        return wait_until(lambda: (found := [c["images"] for c in self.look()["cells"]]) if not any(-1 in c["images"] for c in self.look()["cells"]) else None, 30, "pictures to load")

    def screenshots(self, folder: Path):
        "The whole notebook as <name>-01.png, <name>-02.png …, a tall window at a time."
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{self.name}-*.png"):
            old.unlink()
        self.driver.set_window_size(1280, 2400)
        time.sleep(0.5)
        outer = self.driver.execute_script("const n = document.querySelector('.jp-Notebook'); return n.querySelector('.jp-WindowedPanel-outer') || n")
        height, step = self.driver.execute_script("""const [o] = arguments, cells = o.querySelectorAll('.jp-Cell');
            o.scrollTop = 0; return [cells.length ? cells[cells.length - 1].getBoundingClientRect().bottom - o.getBoundingClientRect().top : 1, o.clientHeight]""", outer)
        for number, top in enumerate(range(0, int(height), max(step - 20, 1)), 1):
            self.driver.execute_script("arguments[0].scrollTop = arguments[1]", outer, top)
            time.sleep(0.2)
            self.driver.save_screenshot(str(folder / f"{self.name}-{number:02}.png"))
        self.driver.set_window_size(1280, 1000)
