"""Threads that stay: the same results however many there are, and whoever calls."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from native import needs_compiler
from spikellm.kernels.native import build
from spikellm.kernels.native.processors import quota_of, step_threads

PROGRAM = """
#include "team.c"
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct { int64_t *items; } Work;

static int32_t count_up(void *work, int64_t first, int64_t last) {
    for (; first < last; first++) ((Work *)work)->items[first]++;
    return 0;
}

static int32_t fail_once(void *work, int64_t first, int64_t last) {
    (void)work;
    return first <= 7 && 7 < last;
}

static void *caller(void *result) {
    for (int64_t round = 0; round < 400; round++) {
        const int64_t count = 1 + round % 97;
        Work work = {calloc((size_t)count, sizeof(int64_t))};
        if (share_work(count_up, &work, count, 1 + (int32_t)(round % 4))) *(int *)result = 1;
        for (int64_t i = 0; i < count; i++) if (work.items[i] != 1) *(int *)result = 1;
        free(work.items);
    }
    return NULL;
}

int main(void) {
    int wrong[3] = {0}, status = 0;
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) pthread_create(&threads[i], NULL, caller, &wrong[i]);
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    if (!share_work(fail_once, NULL, 20, 3) || share_work(fail_once, NULL, 5, 3)) return 2;
    if (fork() == 0) {
        int own = 0;
        caller(&own);
        _exit(own);
    }
    wait(&status);
    return wrong[0] | wrong[1] | wrong[2] | (status != 0);
}
"""


@needs_compiler
def test_every_item_is_run_once_by_whoever_calls(tmp_path: Path) -> None:
    """Several callers at once, more threads than items, and a child of a fork."""
    folder, tool = Path(build.__file__).parent, build.compiler()
    assert tool is not None
    (tmp_path / "main.c").write_text(PROGRAM, encoding="utf-8")
    command = [tool, "-O2", "-pthread", f"-I{folder}", "main.c", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    done = subprocess.run([tmp_path / "main"], check=False, timeout=100)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("text", "processors"),
    [("max 100000\n", 1000), ("150000 100000\n", 2), ("50000 100000\n", 1), ("400000 100000\n", 4)],
)
def test_a_control_group_limits_threads(text: str, processors: int) -> None:
    assert quota_of(text) == processors
    assert step_threads() >= 1
