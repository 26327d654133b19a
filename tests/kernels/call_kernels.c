/* Calls functions of a library with arguments from a file, and compares what they write, byte by byte. Everything is of the byte order of the machine.

   A call: the length of its name and the name, the number of arguments, and for each a letter: i, an integer; d, a double; n, null; r and w, an array that is read, or written as
   it stands there: its bytes behind their number. Numbers are 64 bits. Integers and doubles are passed in registers of their own and then in words of 8 bytes, whatever their
   order, on all processors that this is for. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 20

typedef int32_t (*Function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                            int64_t, int64_t, int64_t, double);

static void *take(FILE *file, size_t bytes) {
    void *found = malloc(bytes + 1);
    if (!found || fread(found, 1, bytes, file) != bytes) exit(3);
    ((char *)found)[bytes] = 0;
    return found;
}

static int64_t number(FILE *file) {
    int64_t *found = take(file, sizeof *found), value = *found;
    free(found);
    return value;
}

int main(int count, char **words) {
    void *library = count == 3 ? dlopen(words[1], RTLD_NOW) : NULL;
    FILE *file = library ? fopen(words[2], "rb") : NULL;
    if (!file) return fprintf(stderr, "%s\n", library ? "no calls" : dlerror()), 2;
    int32_t (*const level)(void) = (int32_t (*)(void))dlsym(library, "spikellm_level"), (*const best)(void) = (int32_t (*)(void))dlsym(library, "spikellm_best_level");
    int64_t calls = number(file), different = 0;
    for (int64_t call = 0; call < calls; call++) {
        char *name = take(file, (size_t)number(file));
        Function function = (Function)dlsym(library, name);
        int64_t given = number(file), integers = 0, own[MOST] = {0}, written = 0, sizes[MOST];
        void *found[MOST], *expected[MOST];
        double real = 0.0;
        for (int64_t i = 0; i < given; i++) {
            const int kind = fgetc(file);
            if (kind == 'd') {
                double *value = take(file, sizeof *value);
                real = *value;
                free(value);
            } else if (kind == 'i' || kind == 'n') {
                own[integers++] = kind == 'i' ? number(file) : 0;
            } else {
                const int64_t size = number(file);
                void *array = take(file, (size_t)size);
                if (kind == 'w') {
                    expected[written] = array, sizes[written] = size;
                    array = found[written++] = calloc(1, (size_t)size + 1);
                }
                own[integers++] = (int64_t)(uintptr_t)array;
            }
        }
        if (!function) return fprintf(stderr, "no %s\n", name), 2;
        const int32_t failed = function(own[0], own[1], own[2], own[3], own[4], own[5], own[6], own[7], own[8], own[9], own[10], own[11], own[12], own[13], own[14], own[15], own[16],
                                        own[17], own[18], own[19], real);
        int other = failed != 0;
        for (int64_t i = 0; i < written; i++) other |= memcmp(found[i], expected[i], (size_t)sizes[i]) != 0;
        if (other) fprintf(stderr, "call %lld, %s\n", (long long)call, name);
        different += other;
    }
    printf("level %d of %d, %lld calls, %lld different\n", level(), best(), (long long)calls, (long long)different);
    return different != 0;
}
