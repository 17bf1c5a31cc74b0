// The official client for JavaScript: files, and the whole life of fine-tuning jobs.

const assert = require("node:assert/strict");
const fs = require("node:fs");
const { setTimeout: sleep } = require("node:timers/promises");
const { OpenAI, NotFoundError } = require("openai");

const client = new OpenAI();
const jobs = client.fineTuning.jobs;
const model = "gpt-4o-mini-2024-07-18";
const WAITING = ["validating_files", "queued", "running"];

async function upload(path) {
  const file = await client.files.create({ file: fs.createReadStream(path), purpose: "fine-tune" });
  assert.equal(file.filename, path);
  assert.equal(file.bytes, fs.statSync(path).size);
  return file.id;
}

async function ended(id) {
  const deadline = Date.now() + 120_000;
  for (;;) {
    const job = await jobs.retrieve(id);
    if (!WAITING.includes(job.status)) return job;
    assert.ok(Date.now() < deadline, job.status);
    await sleep(1000);
  }
}

async function ids(page) {
  const found = [];
  for await (const one of page) found.push(one.id);
  return found;
}

async function jobsAreListedByMetadata(training_file) {
  const metadata = { team: "node", run: String(Date.now()) };
  const tagged = await jobs.create({ model, training_file, metadata });
  const plain = await jobs.create({ model, training_file });
  for (const job of [tagged, plain]) assert.equal((await jobs.cancel(job.id)).status, "cancelled");
  assert.deepEqual((await jobs.list({ limit: 2 })).data.map((job) => job.id), [plain.id, tagged.id]);
  assert.deepEqual(await ids(jobs.list({ metadata })), [tagged.id]);
  const without = await ids(jobs.list({ metadata: null, limit: 5 }));
  assert.ok(without.includes(plain.id));
  assert.ok(!without.includes(tagged.id));
}

async function aPausedJobGoesOn(training_file, validation_file) {
  const job = await jobs.create({
    model,
    training_file,
    validation_file,
    suffix: "node",
    method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 1, batch_size: 4 } } },
  });
  assert.ok(WAITING.includes(job.status));
  assert.equal((await jobs.pause(job.id)).status, "paused");
  assert.equal((await jobs.retrieve(job.id)).status, "paused");
  assert.ok(WAITING.includes((await jobs.resume(job.id)).status));
  return ended(job.id);
}

async function aJobEndsInAModel(job) {
  assert.equal(job.status, "succeeded", JSON.stringify(job.error));
  assert.ok(job.fine_tuned_model.startsWith(`ft:${model}:olora:node:`));
  assert.equal((await client.models.retrieve(job.fine_tuned_model)).id, job.fine_tuned_model);
  const events = (await jobs.listEvents(job.id, { limit: 100 })).data;
  assert.equal(events[0].message, "The job has successfully completed");
  assert.equal(events.at(-1).message, `Created fine-tuning job: ${job.id}`);
  assert.deepEqual(await ids(jobs.listEvents(job.id, { limit: 4 })), events.map((event) => event.id));
  const steps = events.filter((event) => event.type === "metrics").map((event) => event.data.step);
  const checkpoints = (await jobs.checkpoints.list(job.id)).data;
  assert.equal(checkpoints[0].step_number, steps[0]);
  const table = (await (await client.files.content(job.result_files[0])).text()).trim().split("\n");
  assert.ok(table[0].startsWith("step,train_loss,train_accuracy"));
  assert.equal(table.length - 1, steps.length);
}

async function main() {
  const training = await upload("train.jsonl");
  await jobsAreListedByMetadata(training);
  await aJobEndsInAModel(await aPausedJobGoesOn(training, await upload("valid.jsonl")));
  assert.equal((await client.files.delete(training)).deleted, true);
  await assert.rejects(() => client.files.retrieve(training), NotFoundError);
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
