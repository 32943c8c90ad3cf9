"use strict";
(() => {
  const data = JSON.parse(document.getElementById("ballots").textContent);
  const name = "dmpo-votes-" + data.page;
  const at = (id) => document.getElementById(id);
  const choices = ["left", "tie", "right"];
  const random = crypto.getRandomValues(new Uint8Array(8));
  let state = {voter: Array.from(random, (b) => b.toString(16).padStart(2, "0")).join(""), votes: []};
  let ready = false;

  // Votes are a list in the order of the pairs, so that undo takes the last one away.
  const valid = (found) =>
    found && /^[0-9a-f]{16}$/.test(found.voter) && Array.isArray(found.votes) &&
    found.votes.length <= data.ballots.length && found.votes.every((v) => choices.includes(v));

  function settle(request, done) {
    return new Promise((resolve, reject) => {
      request[done] = () => resolve(request.result);
      request.onerror = request.onabort = () => reject(request.error);
    });
  }

  // Not localStorage: browsers write that up to a minute late, and a crash takes the votes with it.
  async function open() {
    const request = indexedDB.open(name);
    request.onupgradeneeded = () => request.result.createObjectStore("state");
    return settle(request, "onsuccess");
  }

  async function load() {
    try {
      const store = (await database).transaction("state").objectStore("state");
      const found = await settle(store.get("votes"), "onsuccess");
      if (valid(found)) state = found;
    } catch {
      at("trouble").hidden = false;
    }
  }

  // Done when the votes are on disk.
  async function save() {
    try {
      const change = (await database).transaction("state", "readwrite", {durability: "strict"});
      change.objectStore("state").put(state, "votes");
      await settle(change, "oncomplete");
    } catch {
      at("trouble").hidden = false;
    }
  }

  function preload(ballot) {
    for (const side of ballot ? ["left", "right"] : []) new Image().src = ballot[side];
  }

  // The load event, not decode(): that waits for the browser to draw, which a starved one puts off.
  function loadImage(image, source) {
    const loaded = settle(image, "onload");
    image.src = source;
    return loaded;
  }

  async function show() {
    const number = state.votes.length, total = data.ballots.length;
    const done = number === total;
    ready = false;
    at("pair").hidden = at("question").hidden = at("tie").hidden = done;
    at("thanks").hidden = !done;
    at("undo").disabled = number === 0;
    at("export").disabled = number === 0;
    at("progress").value = number;
    at("count").textContent = done
      ? `All ${total} pairs are done.`
      : `Pair ${number + 1} of ${total}`;
    if (done) return;
    const ballot = data.ballots[number];
    at("prompt").textContent = ballot.prompt;
    // Nobody votes on what is not there yet.
    const sides = ["left", "right"];
    try {
      await Promise.all(sides.map((side) => loadImage(at(side + "-image"), ballot[side])));
    } catch {
      if (state.votes.length === number) at("missing").hidden = false;
      return;
    }
    if (state.votes.length !== number) return;
    at("missing").hidden = true;
    ready = true;
    document.body.dataset.ready = number;
    preload(data.ballots[number + 1]);
  }

  let work = Promise.resolve();

  // One after the other; what was meant for votes that are others by then is dropped.
  function change(edit) {
    const number = state.votes.length;
    ready = false;
    work = work.then(async () => {
      if (state.votes.length === number) {
        edit(state.votes);
        await save();
      }
      show();
    });
  }

  function refresh() {
    work = work.then(async () => {
      const before = JSON.stringify(state);
      await load();
      if (JSON.stringify(state) !== before) show();
    });
  }

  function vote(choice) {
    if (ready) change((votes) => votes.push(choice));
  }

  function undo() {
    if (state.votes.length) change((votes) => votes.pop());
  }

  function exported() {
    const votes = state.votes.map((choice, ballot) => ({ballot, choice}));
    return JSON.stringify({format: 1, page: data.page, voter: state.voter, votes}, null, 1);
  }

  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([exported()], {type: "application/json"}));
    link.download = `votes-${state.voter}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  const keys = {
    ArrowLeft: () => vote("left"),
    ArrowRight: () => vote("right"),
    ArrowDown: () => vote("tie"),
    u: undo,
    U: undo,
  };
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  for (const choice of choices) at(choice).addEventListener("click", () => vote(choice));
  at("undo").addEventListener("click", undo);
  at("export").addEventListener("click", download);
  // Another tab of the same page may have voted meanwhile.
  window.addEventListener("focus", refresh);
  const database = open();
  work = load().then(save).then(() => void show());
})();
