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

  function load() {
    try {
      const found = JSON.parse(localStorage.getItem(name));
      if (valid(found)) state = found;
    } catch {
      at("trouble").hidden = false;
    }
  }

  function save() {
    try {
      localStorage.setItem(name, JSON.stringify(state));
    } catch {
      at("trouble").hidden = false;
    }
  }

  function preload(ballot) {
    for (const side of ballot ? ["left", "right"] : []) new Image().src = ballot[side];
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
    for (const side of ["left", "right"]) at(side + "-image").src = ballot[side];
    // Nobody votes on what is not there yet.
    try {
      await Promise.all(["left", "right"].map((side) => at(side + "-image").decode()));
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

  function vote(choice) {
    if (!ready) return;
    state.votes.push(choice);
    save();
    show();
  }

  function undo() {
    if (!state.votes.length) return;
    state.votes.pop();
    save();
    show();
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
  // Another tab of the same page voted.
  window.addEventListener("storage", (event) => {
    if (event.key === name) {
      load();
      show();
    }
  });
  load();
  save();
  show();
})();
