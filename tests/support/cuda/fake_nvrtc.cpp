/* NVRTC for the fake driver: compiles for the CPU by the command in OFFLOAD_MOE_SHIM (`shim.py`), and gives an image that names
 * the library. */
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unistd.h>
#include <vector>

struct program {
    std::string text, image, log;
};

#define CALL extern "C" __attribute__((visibility("default"))) int
enum { OK = 0, INVALID_PROGRAM = 4, COMPILATION = 6 };

static std::string quoted(const std::string &word) {
    std::string out = "'";
    for (const char c : word) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
    return out + "'";
}

CALL nvrtcVersion(int *major, int *minor) { return *major = 13, *minor = 0, OK; }
CALL nvrtcGetNumSupportedArchs(int *count) { return *count = 6, OK; }
CALL nvrtcGetSupportedArchs(int *all) {
    const int known[] = {75, 80, 86, 89, 90, 120};
    return std::memcpy(all, known, sizeof known), OK;
}
CALL nvrtcCreateProgram(program **made, const char *text, const char *, int num_headers, const char *const *, const char *const *) {
    return num_headers ? INVALID_PROGRAM : (*made = new program{text, "", ""}, OK);
}
CALL nvrtcDestroyProgram(program **p) { return delete *p, *p = nullptr, OK; }

CALL nvrtcCompileProgram(program *p, int count, const char *const *options) {
    const char *shim = std::getenv("OFFLOAD_MOE_SHIM");
    if (!shim) return p->log = "OFFLOAD_MOE_SHIM is not set", COMPILATION;
    char input[] = "/tmp/om-nvrtc-XXXXXX";
    const int file = mkstemp(input);
    if (file < 0 || write(file, p->text.data(), p->text.size()) != (ssize_t)p->text.size()) return COMPILATION;
    close(file);
    std::string command = shim;
    for (int n = 0; n < count; n++)
        if (!std::strncmp(options[n], "-D", 2) || !std::strncmp(options[n], "-I", 2)) command += " " + quoted(options[n]);
    command += " < " + std::string(input) + " 2>&1";
    std::string output;
    char part[4096];
    FILE *pipe = popen(command.c_str(), "r");
    while (pipe && std::fgets(part, sizeof part, pipe)) output += part;
    const bool is_well = pipe && pclose(pipe) == 0;
    unlink(input);
    p->log = is_well ? "" : output;
    if (is_well) p->image = "OMFAKE:" + output.substr(0, output.find('\n')) + std::string(1, '\0');
    return is_well ? OK : COMPILATION;
}

CALL nvrtcGetProgramLogSize(program *p, size_t *size) { return *size = p->log.size() + 1, OK; }
CALL nvrtcGetProgramLog(program *p, char *to) { return std::memcpy(to, p->log.c_str(), p->log.size() + 1), OK; }
CALL nvrtcGetCUBINSize(program *p, size_t *size) { return *size = p->image.size(), OK; }
CALL nvrtcGetCUBIN(program *p, char *to) { return std::memcpy(to, p->image.data(), p->image.size()), OK; }
extern "C" __attribute__((visibility("default"))) const char *nvrtcGetErrorString(int code) {
    return code == COMPILATION ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR";
}
