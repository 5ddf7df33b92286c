"""What the machine says of itself."""

from jaxinfer import kernels


def test_free_memory_is_what_the_host_and_the_container_leave(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:       9000 kB\nMemFree:  1 kB\nMemAvailable:    5000 kB\n")
    assert list(kernels.host_memory(tmp_path, tmp_path / "none")) == [5000 * 1024]
    assert list(kernels.host_memory(tmp_path / "none", tmp_path / "none")) == []
    v2, v1 = tmp_path / "v2", tmp_path / "v1" / "memory"
    for directory in (v2, v1):
        directory.mkdir(parents=True)
        (directory / "memory.stat").write_text("anon 700\nfile 200\ncache 5\ntotal_cache 300\n")
    (v2 / "memory.max").write_text("max\n")
    assert list(kernels.host_memory(tmp_path / "none", v2)) == []
    (v2 / "memory.max").write_text("1000\n")
    (v2 / "memory.current").write_text("900\n")
    (v1 / "memory.limit_in_bytes").write_text("2000\n")
    (v1 / "memory.usage_in_bytes").write_text("900\n")
    assert list(kernels.host_memory(tmp_path / "none", v2)) == [1000 - 900 + 200]
    assert list(kernels.host_memory(tmp_path, v1.parent)) == [5000 * 1024, 2000 - 900 + 300]
    free = kernels.free_memory()
    assert free is None or free > 0
