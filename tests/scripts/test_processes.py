"""Several processes: they say what one says, agree before they run, and none outlives another."""

import contextlib
import json
import signal
import socket
import threading
import time

import processes
import pytest

# those of test_decode_mesh.py, whose runs are these
WORDS = ("--prompt", "def f(x):", "import os", "a longer prompt than the others", "--max-new-tokens", "12")


def free_address():
    return f"127.0.0.1:{processes.free_port()}"


# --- as programs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def several(start):
    """Starts two processes of four devices, and gives (exit code, stdout, stderr) of each; none stays behind."""
    running = []

    def several(*words, own=((), ()), wait=True, **options):
        address = free_address()
        for id, more in enumerate(own):
            flags = ("--coordinator", address, "--num-processes", len(own), "--process-id", id, "--cpu-devices", 4)
            running.append(start(*words, *flags, *more, **options))
        return ends(running) if wait else running

    yield several
    for process in running:
        process.kill()
        process.communicate()


def ends(running, timeout=100):
    told = [process.communicate(timeout=timeout) for process in running]
    return [(process.returncode, *text) for process, text in zip(running, told, strict=True)]


def says_the_same(several, alone, words, mesh, *more):
    """Two processes of four devices, one of eight and one device: the same text."""
    (code, out, err), (other, nothing, quiet) = several(*words, "--mesh", mesh, "--json", *more)
    assert (code, other, nothing, err, quiet) == (0, 0, "", "", "")
    *text, report = out.splitlines()
    report = json.loads(report)
    for wanted, told in (alone(*words), alone(*words, "--cpu-devices", "8", "--mesh", mesh)):
        assert text == wanted
        assert report["ids"] == told["ids"]
    assert {key: report[key] for key in ("mesh", "per_device", "collectives", "weight_bytes")} == {
        key: told[key] for key in ("mesh", "per_device", "collectives", "weight_bytes")
    }


def test_two_processes_of_four_devices_say_what_one_of_eight_and_one_device_say(several, alone, tiny):
    says_the_same(several, alone, ("--model", tiny, *WORDS, "--temperature", "1"), "data=2,tensor=4")


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["data=2,tensor=4", "tensor=8"])
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_the_builtin_model_says_the_same_in_two_processes(several, alone, temperature, mesh):
    says_the_same(
        several, alone, (*WORDS, "--dtype", "float32", "--max-new-tokens", "32", "--temperature", temperature), mesh
    )


def test_the_environment_of_a_cluster_is_enough(start, alone, tiny):
    words = ("--model", tiny, *WORDS, "--temperature", "1", "--json")
    job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    job["JAX_COORDINATOR_PORT"] = str(processes.free_port())
    mesh = ("--distributed", "--cpu-devices", "4", "--mesh", "data=2,tensor=4")
    first, second = ends([start(*words, *mesh, SLURM_PROCID=str(id), **job) for id in (0, 1)])
    assert first[0] == second[0] == 0
    told = alone("--model", tiny, *WORDS, "--temperature", "1")[1]
    assert json.loads(first[1].splitlines()[-1])["ids"] == told["ids"]


@pytest.fixture
def endless(several, small):
    """Two processes in the middle of a long text."""
    words = ("--model", small, "--prompt", "def f(x):", "--max-new-tokens", "3000")
    running = several(*words, wait=False)
    assert running[0].stdout.read(12).startswith("def f(x):")
    return running


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_other_with_one_line(endless, killed):
    begin = time.monotonic()
    endless[killed].kill()
    code, _, err = ends(endless)[1 - killed]
    assert time.monotonic() - begin < 20
    assert (code, err.count("\n")) == (1, 1), err
    assert f"process {1 - killed}: process {killed} died, or its connection did" in err


def test_ctrl_c_in_one_process_ends_all_with_the_report(endless):
    endless[1].send_signal(signal.SIGINT)
    (code, _, err), other = ends(endless, timeout=30)
    assert (code, other) == (130, (130, "", ""))  # only process 0 prints
    assert "(interrupted)" in err
    assert "mesh tensor=8: " in err  # all devices, where no mesh is said


def test_processes_that_were_started_differently_say_in_what(several, tiny):
    first, second = several("--model", tiny, *WORDS, own=(("--seed", 4), ("--seed", 3)))
    assert first == (1, "", "process 0: decode.py: --seed: 3 in process 1, 4 here: start every process with the same\n")
    assert second == (
        1,
        "",
        "process 1: decode.py: --seed: 3 here, 4 in process 0: start every process with the same\n",
    )


def test_processes_with_other_files_are_refused_before_anything_is_loaded(start, tiny, tmp_path):
    (tmp_path / "model").mkdir()
    for path in tiny.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "model" / "config.json").read_bytes())
    (tmp_path / "model" / "config.json").write_bytes(data.replace(b"10000.0", b"20000.0"))
    words = ("--model", "./model", *WORDS, "--cpu-devices", 4, "--coordinator", free_address(), "--num-processes", 2)
    running = [start(*words, "--process-id", id, cwd=cwd) for id, cwd in enumerate((tiny.parent, tmp_path))]
    for code, out, err in ends(running):
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert "decode.py: config.json: " in err


# --- the protocol --------------------------------------------------------------------------------------------------


class Members:
    """Processes as threads of this one."""

    def __init__(self):
        self.groups, self.errors = {}, {}

    def meet(self, address, *members, timeout=20.0):
        def one(place, num, id):
            try:
                self.groups[place] = processes.meet(address, num, id, timeout)
            except ValueError as error:
                self.errors[place] = str(error)

        self.each([lambda at=at: one(*at) for at in ((i, *member) for i, member in enumerate(members))])

    def agree(self, *facts):
        def one(i):
            try:
                self.groups[i].agree(facts[i])
            except ValueError as error:
                self.errors[i] = str(error)

        self.each([lambda i=i: one(i) for i in range(len(facts))])

    @staticmethod
    def each(calls):
        threads = [threading.Thread(target=call) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)


@pytest.fixture
def members(monkeypatch):
    monkeypatch.setattr(processes, "quit_now", lambda code: None)
    members = Members()
    yield members
    for group in members.groups.values():
        group._close()


def test_processes_that_agree_go_on(members):
    members.meet(free_address(), (3, 0), (3, 1), (3, 2))
    for facts in ({"jax": "1"}, {"prompt": ["a"], "seed": None}):
        members.agree(facts, facts, facts)
    assert members.errors == {}


def test_what_differs_is_said_to_all(members):
    members.meet(free_address(), (3, 0), (3, 1), (3, 2))
    members.agree({"jax": "1", "seed": 0}, {"jax": "1", "seed": 0}, {"jax": "2", "seed": 3})
    assert [members.errors[i].split(":")[0:2] for i in range(3)] == [
        ["jax", ' "2" in process 2, "1" here'],
        ["jax", ' "2" in process 2, "1" in process 0'],
        ["jax", ' "2" here, "1" in process 0'],
    ]


def test_a_fact_that_one_process_lacks_differs(members):
    members.meet(free_address(), (2, 0), (2, 1))
    members.agree({"a": 1}, {"a": 1, "b": 2})
    assert all(error.startswith("b: 2 ") for error in members.errors.values())


def test_processes_that_count_otherwise_or_have_one_id_are_refused(members):
    members.meet(free_address(), (2, 0), (3, 1))
    assert [members.errors[i] for i in (0, 1)] == [
        "--num-processes is 3 in process 1 but 2 in process 0: give all the same"
    ] * 2
    members.meet(free_address(), (3, 0), (3, 1), (3, 1))
    assert [members.errors[i] for i in range(3)] == ["two processes have --process-id 1: give each its own"] * 3


def test_waiting_for_a_process_is_bounded(members):
    address = free_address()
    members.meet(address, (4, 0), (4, 2), timeout=1)
    says = f"processes 1, 3 of 4 did not come to {address} within 1 s: start all of them"
    assert [members.errors[i] for i in (0, 1)] == [says] * 2


def test_a_coordinator_that_does_not_answer_is_named_with_the_seconds(members):
    address = free_address()
    members.meet(address, (2, 1), timeout=1)
    says = f"coordinator {address} could not be reached within 1 s (Connection refused): start process 0 there"
    assert members.errors == {0: says}


def test_a_port_that_is_taken_is_refused(members):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        members.meet(f"127.0.0.1:{taken.getsockname()[1]}", (2, 0), timeout=1)
    assert "cannot be listened at (Address already in use): take another port" in members.errors[0]


def test_a_stranger_at_the_port_disturbs_nobody(members):
    address = free_address()

    def knock():
        time.sleep(0.2)
        with socket.create_connection(processes.split(address)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(OSError):
                assert stranger.recv(10) == b""

    threads = threading.Thread(target=knock), threading.Timer(0.5, lambda: members.meet(address, (2, 1)))
    for thread in threads:
        thread.start()
    group = processes.meet(address, 2, 0, 20)
    for thread in threads:
        thread.join()
    assert group.num == members.groups[0].num == 2
    group._close()


def test_who_loses_another_says_why_and_ends(monkeypatch, capsys):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(processes, "quit_now", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(processes, "GRACE", 0.1)
    members = Members()
    members.meet(free_address(), (2, 0), (2, 1))
    members.groups[1].fail(3, "decode.py: no")
    assert ended.wait(5)
    time.sleep(0.5)
    assert codes == [3, 3]
    assert capsys.readouterr().err == "process 1: decode.py: no\nprocess 0: process 1 ended: decode.py: no\n"


def test_the_end_waits_for_all(monkeypatch):
    codes = []
    monkeypatch.setattr(processes, "quit_now", codes.append)
    members = Members()
    members.meet(free_address(), (2, 0), (2, 1))
    slow = threading.Timer(0.5, members.groups[1].leave, [0])
    slow.start()
    members.groups[0].leave(0)
    slow.join()
    assert codes == [0, 0]
