/* Score pairs of texts with a bundle's ONNX graph: score MODEL.onnx IDS
 *
 * IDS is what ids.py writes: a line with the activation and its temperature, then two lines for each
 * pair, its token ids and its token types (an empty line if the model has none). Prints a line with
 * the score and the logit of each pair. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <onnxruntime_c_api.h>

enum { MOST_TOKENS = 1 << 15, MOST_INPUTS = 3 };

static const OrtApi *ort;

static void fail(const char *what) {
  fprintf(stderr, "score: %s\n", what);
  exit(1);
}

static void check(OrtStatus *status) {
  if (status != NULL) fail(ort->GetErrorMessage(status));
}

static int has_vnni(void) {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512vnni") || __builtin_cpu_supports("avxvnni");
#else
  return 0;
#endif
}

/* Reads the numbers of a line; returns how many there are, or -1 at the end of the file. */
static int64_t numbers(FILE *file, char **line, size_t *size, int64_t *values) {
  if (getline(line, size, file) < 0) return -1;
  int64_t count = 0;
  char *rest = *line;
  for (;;) {
    char *end;
    long long value = strtoll(rest, &end, 10);
    if (end == rest) break;
    if (count == MOST_TOKENS) fail("a pair has too many tokens");
    values[count++] = value;
    rest = end;
  }
  if (rest[strspn(rest, " \r\n")] != '\0') fail("a line holds something other than numbers");
  return count;
}

int main(int argc, char **argv) {
  if (argc != 3) fail("usage: score MODEL.onnx IDS");
  ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (ort == NULL) fail("libonnxruntime is older than the header");

  OrtEnv *env;
  OrtSessionOptions *options;
  OrtSession *session;
  OrtMemoryInfo *memory;
  OrtAllocator *allocator;
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "score", &env));
  check(ort->CreateSessionOptions(&options));
  check(ort->SetIntraOpNumThreads(options, 1));
  /* x86 CPUs without VNNI saturate unsigned x signed int8 products. This widens them, and halves the
     speed of CPUs that have it. */
  if (!has_vnni())
    check(ort->AddSessionConfigEntry(options, "session.x64quantprecision", "1"));
  check(ort->CreateSession(env, argv[1], options, &session));
  check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  check(ort->GetAllocatorWithDefaultOptions(&allocator));

  static int64_t ids[MOST_TOKENS], mask[MOST_TOKENS], types[MOST_TOKENS];
  for (int i = 0; i < MOST_TOKENS; i++) mask[i] = 1;

  size_t inputs;
  check(ort->SessionGetInputCount(session, &inputs));
  if (inputs > MOST_INPUTS) fail("the graph wants more than ids, mask and types: a causal model");
  char *names[MOST_INPUTS];
  int64_t *data[MOST_INPUTS];
  for (size_t i = 0; i < inputs; i++) {
    check(ort->SessionGetInputName(session, i, allocator, &names[i]));
    data[i] = strcmp(names[i], "input_ids") == 0        ? ids
              : strcmp(names[i], "attention_mask") == 0 ? mask
              : strcmp(names[i], "token_type_ids") == 0 ? types
                                                        : NULL;
    if (data[i] == NULL) fail("the graph wants an input that this program does not know");
  }

  FILE *file = fopen(argv[2], "r");
  if (file == NULL) fail("the file of ids cannot be opened");
  char activation[16];
  double temperature;
  if (fscanf(file, "%15s %lf ", activation, &temperature) != 2) fail("the activation is missing");
  int sigmoid = strcmp(activation, "sigmoid") == 0;
  if (!sigmoid && strcmp(activation, "identity") != 0) fail("the activation is unknown");

  char *line = NULL;
  size_t size = 0;
  int64_t tokens;
  while ((tokens = numbers(file, &line, &size, ids)) >= 0) {
    int64_t typed = numbers(file, &line, &size, types);
    if (tokens == 0 || (typed > 0 && typed != tokens)) fail("ids and types differ in number");
    int64_t shape[] = {1, tokens};
    OrtValue *values[MOST_INPUTS];
    for (size_t i = 0; i < inputs; i++) {
      if (data[i] == types && typed <= 0) fail("the graph wants token types, the file has none");
      check(ort->CreateTensorWithDataAsOrtValue(memory, data[i], tokens * sizeof(int64_t), shape, 2,
                                                ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &values[i]));
    }
    const char *outputs[] = {"logits"};
    OrtValue *found = NULL;
    float *logit;
    check(ort->Run(session, NULL, (const char *const *)names, (const OrtValue *const *)values,
                   inputs, outputs, 1, &found));
    check(ort->GetTensorMutableData(found, (void **)&logit));
    double x = logit[0] / temperature;
    printf("%.9g\t%.9g\n", sigmoid ? 1 / (1 + exp(-x)) : x, logit[0]);
    ort->ReleaseValue(found);
    for (size_t i = 0; i < inputs; i++) ort->ReleaseValue(values[i]);
  }

  free(line);
  fclose(file);
  for (size_t i = 0; i < inputs; i++) check(ort->AllocatorFree(allocator, names[i]));
  ort->ReleaseMemoryInfo(memory);
  ort->ReleaseSession(session);
  ort->ReleaseSessionOptions(options);
  ort->ReleaseEnv(env);
  return 0;
}
