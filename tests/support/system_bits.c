/* system_bits OUT FOLDER: what has to be the same on every system, without Python: for Windows in an emulator of its calls.
 *
 * Writes the results of every kernel set of the machine, of made-up values, into the file OUT and prints the sets' names; then
 * reads a file of FOLDER at offsets, by many threads at once and around the cache. Exits 1 where a read has other bytes. */
#define _GNU_SOURCE
#include "platform.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#include <windows.h>
#else
#include <sys/stat.h>
#include <unistd.h>
#endif

enum { ROWS = 150, TOKENS = 9, COLUMNS = 320, RECORD_BYTES = 1 << 18, FILE_PAGES = 300, READERS = 8, ROUNDS = 40 };

static const char *const SETS[] = {"portable", "avx2", "avxvnni", "avx512vl", "avx512", "avx512vbmi", "neon"};
static uint8_t record[RECORD_BYTES];
static float x[TOKENS * COLUMNS], out[TOKENS * ROWS];
static uint64_t state;

static uint32_t next(void) { return (uint32_t)((state = state * 6364136223846793005ull + 1442695040888963407ull) >> 33); }
static float noise(void) { return (float)((int)(next() % 2001) - 1000) / 500.0f; }

static om_matrix made_up(int codec) {
    om_matrix m = {.rows = ROWS, .cols = COLUMNS, .padded = COLUMNS, .codes = 0, .scales = -1, .nested_scales = -1,
                   .nested_offset = -1, .bias = -1, .codec = codec};
    for (int i = 0; i < RECORD_BYTES; i++) record[i] = (uint8_t)next();
    if (codec == OM_BF16)
        for (int i = 0; i < ROWS * COLUMNS; i++) ((uint16_t *)record)[i] = om_float_to_bf16(noise());
    if (codec == OM_BF16) return m;
    m.scales = 1 << 17;
    if (codec == OM_INT8)
        for (int i = 0; i < ROWS * COLUMNS / 64; i++) ((float *)(record + m.scales))[i] = fabsf(noise()) / 100.0f;
    if (codec == OM_NF4) {
        m.nested_scales = m.scales + (1 << 16), m.nested_offset = m.nested_scales + (1 << 15);
        for (int i = 0; i < 64; i++) ((float *)(record + m.nested_scales))[i] = 0.01f + fabsf(noise()) / 100.0f;
        *(float *)(record + m.nested_offset) = 0.05f;
    }
    return m;
}

static int compute(FILE *file) {
    static const int codecs[] = {OM_NF4, OM_INT8, OM_BF16};
    int num_failures = 0;
    for (size_t s = 0; s < sizeof SETS / sizeof *SETS; s++) {
        if (om_select(SETS[s]) != 0) continue;
        printf("%s\n", SETS[s]);
        state = 1;
        for (int i = 0; i < TOKENS * COLUMNS; i++) x[i] = noise();
        for (int n = 0; n < 3; n++) {
            const om_matrix m = made_up(codecs[n]);
            const uint8_t *records[] = {record};
            void *outs[] = {out};
            for (int tokens = 1; tokens <= TOKENS; tokens++) {
                om_configure_threads(tokens % 4 + 1, 0);
                num_failures += om_linear_forward(&m, records, outs, 1, x, tokens, OM_F32, OM_F32) != 0;
                fwrite(out, sizeof *out, (size_t)tokens * ROWS, file);
            }
        }
        static uint8_t codes[TOKENS * COLUMNS];
        static float scales[TOKENS * COLUMNS / 64];
        om_encode_nf4(x, OM_F32, TOKENS * COLUMNS / 64, codes, scales);
        fwrite(codes, 1, sizeof codes / 2, file), fwrite(scales, 1, sizeof scales, file);
        om_encode_int8(x, OM_F32, TOKENS * COLUMNS / 64, (int8_t *)codes, scales);
        fwrite(codes, 1, sizeof codes, file), fwrite(scales, 1, sizeof scales, file);
    }
    return num_failures;
}

static _Alignas(OM_PAGE) uint8_t buffers[READERS][16 * OM_PAGE]; /* reads around the cache are into whole pages */

static uint8_t byte_at(int64_t offset) { return (uint8_t)(offset * 7 + (offset >> 12) * 31); }

/* A file of FILE_PAGES pages, with letters beyond ASCII in its name and more than 260 in its path; open around the cache. */
#ifdef _WIN32
static int32_t open_made_up(const char *folder, const uint8_t *bytes, size_t num_bytes) {
    wchar_t path[700] = L"\\\\?\\", part[40] = L"\\\u0444\u0430\u0439\u043b-\u00fc\u00e4-";
    MultiByteToWideChar(CP_UTF8, 0, folder, -1, path + 4, 200);
    for (wchar_t *at = path; *at != 0; at++)
        if (*at == L'/') *at = L'\\'; /* the extended form has no other */
    while (wcslen(part) < 30) wcscat(part, L"x");
    for (int depth = 0; depth < 10; depth++) wcscat(path, part), CreateDirectoryW(path, NULL);
    wcscat(path, L"\\\U0001F4BE.bin");
    const HANDLE written = CreateFileW(path, GENERIC_WRITE, 0, NULL, CREATE_ALWAYS, 0, NULL);
    DWORD count = 0;
    if (written == INVALID_HANDLE_VALUE || !WriteFile(written, bytes, (DWORD)num_bytes, &count, NULL)) return -1;
    CloseHandle(written);
    const DWORD flags = FILE_FLAG_NO_BUFFERING | FILE_FLAG_OVERLAPPED;
    return (int32_t)(intptr_t)CreateFileW(path, GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_DELETE, NULL, OPEN_EXISTING, flags, NULL);
}
#else
static int32_t open_made_up(const char *folder, const uint8_t *bytes, size_t num_bytes) {
    char path[700];
    snprintf(path, sizeof path, "%s", folder);
    for (int depth = 0; depth < 10; depth++) strcat(path, "/\u0444\u0430\u0439\u043b-xxxxxxxxxxxxxxxxxxxxxxxx"), mkdir(path, 0755);
    strcat(path, "/\U0001F4BE.bin");
    const int written = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0644);
    if (write(written, bytes, num_bytes) != (ssize_t)num_bytes) return -1;
    close(written);
    return open(path, O_RDONLY);
}
#endif

typedef struct {
    int32_t file, number, num_wrong;
} reader;

static void *read_parts(void *argument) {
    reader *r = argument;
    uint8_t *const buffer = buffers[r->number];
    for (int round = 0; round < ROUNDS; round++) {
        const int64_t first = (round * 37 + r->number * 11) % (FILE_PAGES - 16) * OM_PAGE;
        r->num_wrong += om_read_file(r->file, buffer, 16 * OM_PAGE, first) != 16 * OM_PAGE;
        for (int64_t i = 0; i < 16 * OM_PAGE; i += 13) r->num_wrong += buffer[i] != byte_at(first + i);
    }
    return NULL;
}

static int read_back(const char *folder) {
    static uint8_t bytes[FILE_PAGES * OM_PAGE - 100]; /* the last page is not whole */
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = byte_at((int64_t)i);
    const int32_t file = open_made_up(folder, bytes, sizeof bytes);
    if (file < 0) return fprintf(stderr, "the file cannot be made in %s\n", folder), 1;
    pthread_t threads[READERS];
    reader readers[READERS];
    int num_wrong = 0;
    for (int n = 0; n < READERS; n++) {
        readers[n] = (reader){.file = file, .number = n};
        if (pthread_create(&threads[n], NULL, read_parts, &readers[n]) != 0) return 1;
    }
    for (int n = 0; n < READERS; n++) pthread_join(threads[n], NULL), num_wrong += readers[n].num_wrong;
    uint8_t *const page = buffers[0];
    num_wrong += om_read_file(file, page, 2 * OM_PAGE, (FILE_PAGES - 1) * OM_PAGE) != OM_PAGE - 100;
    num_wrong += om_read_file(file, page, OM_PAGE, FILE_PAGES * OM_PAGE) != 0;
    num_wrong += om_read_file(0x7ffffff0, page, OM_PAGE, 0) != -EBADF;
    if (num_wrong != 0) fprintf(stderr, "%d wrong bytes or counts were read\n", num_wrong);
    return num_wrong != 0;
}

int main(int count, char **arguments) {
    FILE *const file = count == 3 ? fopen(arguments[1], "wb") : NULL;
    if (file == NULL) return fprintf(stderr, "usage: system_bits OUT FOLDER\n"), 2;
    const int num_failures = compute(file);
    return fclose(file) != 0 || num_failures != 0 || read_back(arguments[2]);
}
